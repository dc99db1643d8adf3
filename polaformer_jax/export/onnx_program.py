"""Programs as ONNX files, for ONNX Runtime and others."""

import json
from typing import Any

from etils import epath
from flax import nnx

from polaformer_jax.errors import UserError
from polaformer_jax.export import onnx_file
from polaformer_jax.export.program import check_target, program_of
from polaformer_jax.models.pola_pp import PolaPP
from polaformer_jax.models.pola_swin import PolaSwin
from polaformer_jax.models.token_attention import departures

FORMAT = "polaformer_jax/onnx/1"
SUFFIX = ".onnx"


def onnx(
    model: nnx.Module,
    path: epath.PathLike,
    *,
    preprocess: bool = False,
    maps: tuple[int, int] | None = None,
    dtype: str = "float32",
    opset: int = onnx_file.OLDEST_OPSET,
) -> dict[str, Any]:
    """Writes a model's program in evaluation to an ONNX file, in float32 and for batches of any size.

    All families but PolaFormer++ can be written.

    It needs the extra `onnx`, whose packages pin others to older versions than training takes: install it in an
    environment of its own.

    Args:
        path: of the file, `.onnx`; it is written completely or not at all.
        preprocess: take images as uint8 pixels (batch, img_size, img_size, 3), already resized and cropped, and return
            probabilities; otherwise images are float32 and normalised, and logits are returned. (A model without
            classifier returns features, a sequence model takes tokens and lengths.)
        maps: (stage, block) of a linear block: its mean attention maps are two further outputs, `same` and `opposite`,
            (batch, side, side), in units of uniform attention.
        dtype: "float32", the only one.
        opset: version of ONNX's operators, 21 or later.

    Returns:
        The metadata in the file, which has each entry as JSON.

    Raises:
        UserError: the extra is not installed, an option does not fit the model, or the file cannot be written.
    """
    path = check_target(path, SUFFIX)
    if dtype != "float32":
        raise UserError(
            f"{dtype!r}: ONNX files are written in float32. Tools of the runtime make them smaller, such as"
            " onnxruntime.quantization for integers of 8 bits",
            argument="dtype",
        )
    if isinstance(model, PolaPP):
        raise UserError("PolaFormer++ cannot be written as ONNX so far: export it as StableHLO")
    if (other := departures(model.config)) and getattr(model.config, "convolution", False):
        raise UserError(
            f"a model with {', '.join(other)}, beside the convolution of the values, cannot be written as ONNX so far:"
            " export it as StableHLO"
        )
    if isinstance(model, PolaSwin) and model.is_padded():
        raise UserError(
            f"at img_size={model.config.img_size} this Pola-Swin has padded windows, which cannot be written as ONNX so"
            " far: choose a size that the windows divide, or export the model as StableHLO"
        )
    program = program_of(model, preprocess=preprocess, maps=maps, dtype=dtype)
    metadata = {"format": FORMAT, **program.metadata, "opset": opset}
    onnx_file.write(
        lambda *inputs: program.function(program.params, *inputs),
        {name: (("batch", *shape), dtype) for name, (shape, dtype) in program.inputs.items()},
        path,
        outputs=program.outputs,
        weights=program.params,
        metadata={key: json.dumps(value) for key, value in metadata.items()},
        opset=opset,
    )
    return metadata
