"""Semantic segmentation: a backbone, a LayerNorm for each of its maps, and a head that classifies every pixel.

`Segmenter` is built like the encoder-decoders of MMSegmentation (https://github.com/open-mmlab/mmsegmentation, 1.2.2),
whose names its parts have: `backbone`, `neck`, `decode_head`, `auxiliary_head`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.config import HEADS
from polaformer_jax.models.dense_heads import FPN, FCNHead, SemanticFPNHead, UPerHead
from polaformer_jax.models.families import BACKBONES, config_of
from polaformer_jax.models.initializers import Keys
from polaformer_jax.models.layers import layer_norm
from polaformer_jax.models.model_config import Checks, ModelConfig, check_computation, resolve_config
from polaformer_jax.models.model_info import ModelInfo

_CHANNELS = dict(zip(HEADS, (128, 512), strict=True))
_AUXILIARY = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterConfig(ModelConfig):
    """Hyper-parameters of a `Segmenter`.

    Attributes:
        backbone: those of the backbone, whose `num_classes` is 0. Its `img_size` is the side of the training crops.
        num_classes: classes of a pixel.
        head: "semantic_fpn" (Kirillov et al., CVPR 2019) or "upernet" (Xiao et al., ECCV 2018).
        head_channels: of the head; None: 128 of "semantic_fpn", whose neck has twice as many, 512 of "upernet".
        auxiliary_channels: of the auxiliary head of "upernet", on the map of stride 16, which is used in training only;
            0: there is none; None: 256 of "upernet".
        dropout: the share of channels that are dropped before the last convolution of a head.

    Raises:
        UserError: lists everything that does not fit.
    """

    family: ClassVar[str] = "Segmenter"

    backbone: ModelConfig
    num_classes: int = 150
    head: str = "upernet"
    head_channels: int | None = None
    auxiliary_channels: int | None = None
    dropout: float = 0.1

    def _normalised(self, checks: Checks) -> dict[str, object]:
        values = {
            "num_classes": checks.integer("num_classes", self.num_classes, least=2),
            "head": self.head,
            "dropout": checks.number("dropout", self.dropout, least=0, below=1),
        }
        checks.choice("head", self.head, HEADS)
        channels = _CHANNELS.get(self.head, 1) if self.head_channels is None else self.head_channels
        values["head_channels"] = checks.integer("head_channels", channels)
        if values["num_classes"] > 255:
            checks.problems.append(
                f"num_classes={self.num_classes}: at most 255, for masks have 8 bits and 255 is none"
            )
        auxiliary = self.auxiliary_channels
        if auxiliary is None:
            auxiliary = _AUXILIARY if self.head == "upernet" else 0
        values["auxiliary_channels"] = checks.integer("auxiliary_channels", auxiliary, least=0)
        if auxiliary and self.head == "semantic_fpn":
            checks.problems.append(f"auxiliary_channels={auxiliary}: only head='upernet' has an auxiliary head")
        values["backbone"] = self._backbone(checks)
        return values

    def _backbone(self, checks: Checks) -> ModelConfig:
        backbone = self.backbone
        if isinstance(backbone, Mapping):  # as `to_dict` returns it
            fields = {name: value for name, value in backbone.items() if name != "family"}
            backbone = config_of(str(backbone.get("family")), fields)
        if getattr(backbone, "family", None) not in BACKBONES:
            checks.problems.append(
                f"backbone: a {type(backbone).__name__}, expected a config of {', '.join(BACKBONES)}"
            )
            return backbone
        return dataclasses.replace(backbone, num_classes=0)

    @property
    def img_size(self) -> int:
        return self.backbone.img_size

    @property
    def drop_path_rate(self) -> float:
        return self.backbone.drop_path_rate

    def to_dict(self) -> dict[str, object]:
        return {**super().to_dict(), "backbone": {"family": self.backbone.family, **self.backbone.to_dict()}}

    def architecture(self) -> dict[str, object]:
        heads = {name: getattr(self, name) for name in ("head", "head_channels", "auxiliary_channels")}
        backbone = self.backbone.architecture()
        return {
            "family": self.backbone.family,
            **{f"backbone.{name}": value for name, value in backbone.items()},
            **heads,
        }


class Scores(NamedTuple):
    """What a `Segmenter` returns, at least float32.

    Attributes:
        logits: (batch, height / 4, width / 4, classes).
        auxiliary: those of the auxiliary head, (batch, height / 16, width / 16, classes); None outside of training, or
            where there is none.
    """

    logits: jax.Array
    auxiliary: jax.Array | None = None


class Segmenter(nnx.Module):
    """Classifies the pixels of images of any size that is a multiple of 32, not square ones too.

    Args:
        config: the hyper-parameters; None: `SegmenterConfig(**hyperparameters)`.
        dtype: of activations and matrix products: bfloat16, float32 or float64.
        param_dtype: of the stored parameters: float32 or float64.
        attention_impl: of the backbone's polarity-aware attention and MLPs, see `polarity_attention` and `Block`.
        rngs: source of the keys for initial parameters, by `rngs.params()`.
        hyperparameters: fields of `SegmenterConfig`, if no config is given.

    Raises:
        UserError: lists everything that does not fit.
    """

    Config = SegmenterConfig

    def __init__(
        self,
        config: SegmenterConfig | None = None,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        attention_impl: str = "auto",
        rngs: nnx.Rngs,
        **hyperparameters,
    ):
        config = resolve_config(SegmenterConfig, config, hyperparameters)
        dtype, param_dtype = check_computation(
            config.family, dtype=dtype, param_dtype=param_dtype, attention_impl=attention_impl
        )
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.of(rngs)}
        self.backbone = BACKBONES[config.backbone.family](config.backbone, attention_impl=attention_impl, **types)
        channels = config.backbone.stage_channels
        self.norms = nnx.List([layer_norm(width, epsilon=self.backbone.epsilon, **types) for width in channels])
        common = {"num_classes": config.num_classes, "dropout": config.dropout, **types}
        neck = auxiliary = None
        if config.head == "semantic_fpn":
            width = 2 * config.head_channels
            neck = FPN(channels, width=width, **types)
            self.decode_head = SemanticFPNHead((width,) * 4, width=config.head_channels, **common)
        else:
            self.decode_head = UPerHead(channels, width=config.head_channels, **common)
            if config.auxiliary_channels:
                auxiliary = FCNHead(channels[2], width=config.auxiliary_channels, **common)
        self.neck, self.auxiliary_head = neck, auxiliary
        self.config, self.dtype, self.info = config, dtype, ModelInfo()

    def __call__(
        self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None, *, mask: jax.Array | None = None
    ) -> Scores:
        """Scores of normalised images.

        Args:
            images: (batch, height, width, 3), of a float dtype; height and width multiples of 32.
            train: normalise by the statistics of the batch, which the running ones take up; apply dropout and
                stochastic depth, and the auxiliary head.
            rngs: source of the keys for `train`, by `rngs.dropout()`.
            mask: (batch,) bool, in training: the others do not count in the statistics. None: all are valid.

        Raises:
            ValueError: the images' shape or dtype does not fit, or random numbers are needed and rngs is None.
        """
        maps = self.backbone.features(images, train=train, rngs=rngs, mask=mask)
        maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        key = None
        if train:
            mask = jnp.ones(images.shape[0], bool) if mask is None else mask
            if self.config.dropout:
                if rngs is None:
                    raise ValueError("train=True with dropout draws random numbers: pass rngs=nnx.Rngs(dropout=key)")
                key = rngs.dropout()
        else:
            mask = None
        with jax.named_scope("head"):
            logits = self.decode_head(maps if self.neck is None else self.neck(maps), mask=mask, key=key)
        if not train or self.auxiliary_head is None:
            return Scores(logits)
        key = None if key is None else jax.random.fold_in(key, 1)
        with jax.named_scope("head"):
            return Scores(logits, self.auxiliary_head(maps[2], mask=mask, key=key))

    @property
    def remat(self) -> bool:
        """Recompute each block's activations in the backward pass instead of storing them."""
        return self.backbone.remat

    @remat.setter
    def remat(self, value: bool) -> None:
        self.backbone.remat = value

    @property
    def frozen_statistics(self) -> bool:
        """Batch normalisations of the backbone use their running statistics in training too, and keep them."""
        return self.backbone.frozen_statistics

    @frozen_statistics.setter
    def frozen_statistics(self, value: bool) -> None:
        self.backbone.frozen_statistics = value
