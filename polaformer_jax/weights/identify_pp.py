"""The config of a PolaFormer++, from the names and shapes of its tensors."""

from collections.abc import Mapping
from typing import Any

from polaformer_jax.errors import WeightsError
from polaformer_jax.models import registry
from polaformer_jax.models.model_config import ModelConfig
from polaformer_jax.weights.tensor_names import Names


def pola_pp(names: Names, known: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    """Arguments of a `PolaPP`.

    The heads of a stage show in its linear blocks, or in the angles that official checkpoints hold; otherwise they are
    those that the file states, or of the published model of these channels and depths.

    Args:
        known: what the file states besides.
        assumed: is extended by what neither shows.

    Raises:
        WeightsError: the tensors are no complete model, or nothing shows the heads.
    """
    dims, depths, heads, ratios, scaled, flags = [], [], [], [], [], []
    for i in range(4):
        stage = f"layers.{i}.blocks"
        depths.append(names.count(rf"layers\.{i}\.blocks\.(\d+)\.", stage))
        dims.append(names.shape(f"{stage}.0.norm1.norm.weight", 1)[0])
        kinds = ["l" if f"{stage}.{j}.attn.qkvg.weight" in names.shapes else "v" for j in range(depths[-1])]
        flags.append("".join(kinds))
        ratios.append(names.shape(f"{stage}.0.ffn.fc1.weight", 2)[0] / dims[-1])
        scaled.append(f"{stage}.0.gamma_1" in names.shapes)
        heads.append(_heads(names, i, kinds, dims[-1]))
    if None in heads:
        heads = [known["num_heads"][i] if "num_heads" in known and h is None else h for i, h in enumerate(heads)]
    published = _published(dims, depths)
    if None in heads:
        if published is None:
            raise WeightsError(
                f"{names.path}: nothing shows the heads of stage {heads.index(None) + 1}, whose blocks are all softmax"
                " blocks: give the name of the model"
            )
        name, config = published
        stages = ", ".join(str(i + 1) for i, h in enumerate(heads) if h is None)
        assumed.append(f"num_heads of stage {stages}: as in {name}, which has these channels and depths")
        heads = [config.num_heads[i] if h is None else h for i, h in enumerate(heads)]
    arguments = {
        "num_classes": names.classes(),
        "embed_dims": tuple(dims),
        "depths": tuple(depths),
        "num_heads": tuple(heads),
        "mlp_ratios": tuple(ratios),
        "flags": tuple(flags),
        "layerscales": tuple(scaled),
    }
    if "proj.weight" in names.shapes:
        arguments["projection"] = names.shape("proj.weight", 4)[0]
    if known.get("img_size") is not None:
        arguments["img_size"] = known["img_size"]
    elif published is not None:  # no shape depends on it
        arguments["img_size"] = published[1].img_size
    return arguments


def _heads(names: Names, stage: int, kinds: list[str], dim: int) -> int | None:
    if "l" in kinds:
        return names.shape(f"layers.{stage}.blocks.{kinds.index('l')}.attn.s1", 4)[1]
    angles = names.shapes.get(f"layers.{stage}.RoPE.angle")  # half as many as a head has channels
    if angles is None or len(angles) != 1 or not angles[0] or dim % (2 * angles[0]):
        return None
    return dim // (2 * angles[0])


def _published(dims: list[int], depths: list[int]) -> tuple[str, ModelConfig] | None:
    for name in registry.list_models():
        config = registry.model_config(name)
        if config.family == "PolaPP" and (list(config.embed_dims), list(config.depths)) == (dims, depths):
            return name, config
    return None
