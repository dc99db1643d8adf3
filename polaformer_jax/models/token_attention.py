"""The choice of what the linear blocks (type L) of an image model compute: polarity-aware attention, or a baseline."""

from typing import Protocol

from polaformer_jax.config import ATTENTIONS
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.attention_layers import AttentionLayers
from polaformer_jax.models.model_config import Checks, ModelConfig
from polaformer_jax.models.plain_attention import BaselineAttention


class Config(Protocol):
    """The fields of a model's config that choose.

    Attributes:
        attention: "polarity", or "softmax" or "relu" in its place, with the same layers around it.
        convolution: whether a depthwise convolution of the values is added to the result of the attention.
        gate: whether that sum is multiplied by gates, which a linear layer computes from the tokens.
        alpha: of polarity-aware attention.
        kernel_size: of the convolution.
    """

    attention: str
    convolution: bool
    gate: bool
    alpha: float
    kernel_size: int


def check_token_attention(config: Config, checks: Checks) -> dict[str, object]:
    """The values of the three fields that choose, checked."""
    return {
        "attention": checks.choice("attention", config.attention, ATTENTIONS),
        "convolution": checks.boolean("convolution", config.convolution),
        "gate": checks.boolean("gate", config.gate),
    }


def used_token_attention(config: Config, linear_blocks: bool) -> dict[str, object]:
    """The fields as part of an architecture: None where they are without effect, as are all without `linear_blocks`."""
    used = {name: getattr(config, name) if linear_blocks else None for name in Config.__annotations__}
    if used["attention"] != "polarity":
        used["alpha"] = None
    if not used["convolution"]:
        used["kernel_size"] = None
    return used


def departures(config: ModelConfig) -> list[str]:
    """In words, what the linear blocks of an image model have that those of the published models have not."""
    used = config.architecture()
    other = used.get("attention") not in (None, "polarity")
    missing = [f"no {part}" for part in ("convolution", "gate") if used.get(part) is False]
    return [*([f"{used['attention']} attention"] if other else []), *missing]


def token_attention(
    config: Config, dim: int, num_heads: int, *, attention_impl: str = "auto", **layers
) -> AttentionLayers:
    """The attention that a config chooses.

    Args:
        attention_impl: of polarity-aware attention; the baselines are always computed by operations.
        layers: further arguments of `AttentionLayers`.
    """
    layers |= {name: getattr(config, name) for name in ("kernel_size", "convolution", "gate")}
    if config.attention != "polarity":
        return BaselineAttention(dim, num_heads, kind=config.attention, **layers)
    return PolarityAttention(dim, num_heads, alpha=config.alpha, attention_impl=attention_impl, **layers)
