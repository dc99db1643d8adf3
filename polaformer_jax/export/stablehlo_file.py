"""Programs as StableHLO, by `jax.export`: one file that a process with nothing but JAX loads and calls.

The file is a zip archive of two entries: `program.bin`, which `jax.export.deserialize` takes, and `metadata.json`.
Weights are constants of the program, or lie beside the file in a NumPy archive (`.npz`).
"""

import contextlib
import dataclasses
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax import export as jax_export

from polaformer_jax.errors import UserError
from polaformer_jax.export.program import Program, check_target, program_of
from polaformer_jax.files import atomic, paths

FORMAT = "polaformer_jax/stablehlo/1"
SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_OF_NUMPY = ("float32", "float64")
_PROGRAM, _METADATA = "program.bin", "metadata.json"
_OLDEST = (1980, 1, 1, 0, 0, 0)  # of a zip archive; the same program gives the same file


def stablehlo(
    model: nnx.Module,
    path: epath.PathLike,
    *,
    preprocess: bool = False,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    batch_size: int | None = None,
    weights: str = "inside",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Writes a model's program in evaluation to a file, for all platforms at once.

    Args:
        path: of the file, `.stablehlo`; it, and the weights beside it, are written completely or not at all.
        preprocess: take images as uint8 pixels (batch, img_size, img_size, 3), already resized and cropped, and return
            probabilities; otherwise images are float32 and normalised, and logits are returned. (A model without
            classifier returns features, a sequence model takes tokens and lengths.)
        platforms: of "cpu", "cuda", "rocm", "tpu"; they need not be here.
        batch_size: None: any.
        weights: "inside", as constants of the program, or "beside", in a file of the same name with the suffix `.npz`;
            then the program takes a dict of them as its first argument.
        dtype: of activations and matrix products, whatever the model's own.

    Returns:
        The metadata in the file.

    Raises:
        UserError: an option does not fit the model, or the file cannot be written.
    """
    path = check_target(path, SUFFIX)
    if weights == "beside":
        atomic.check_target(beside(path), "weights", argument="weights")
    if weights not in ("inside", "beside"):
        raise UserError(f"{weights!r}: expected inside or beside", argument="weights")
    if not platforms or any(name not in PLATFORMS for name in platforms):
        raise UserError(f"{list(platforms)}: expected some of {', '.join(PLATFORMS)}", argument="platforms")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"{batch_size}, expected at least 1", argument="batch_size")
    program = program_of(model, preprocess=preprocess, dtype=dtype)
    if weights == "beside" and (other := {a.dtype.name for a in program.params.values()} - set(_OF_NUMPY)):
        raise UserError(
            f"the model's parameters are of {', '.join(other)}, which a NumPy archive cannot hold: store them inside",
            argument="weights",
        )
    with _without_locations():
        exported = _exported(program, tuple(platforms), batch_size, inside=weights == "inside")
    metadata = {
        "format": FORMAT,
        **program.metadata,
        "weights": weights,
        "platforms": list(exported.platforms),
        "batch_size": batch_size,
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
    }
    with contextlib.ExitStack() as stack:  # both files are renamed at its end, once both are written
        stack.enter_context(atomic.reported("program", path))
        if weights == "beside":
            file = stack.enter_context(atomic.writing(beside(path)))
            np.savez(file, **{name: np.asarray(array) for name, array in program.params.items()})
        archive = zipfile.ZipFile(stack.enter_context(atomic.writing(path)), "w")
        with archive:
            archive.writestr(zipfile.ZipInfo(_METADATA, _OLDEST), json.dumps(metadata, indent=2))
            archive.writestr(zipfile.ZipInfo(_PROGRAM, _OLDEST), bytes(exported.serialize()))
    return metadata


def _exported(
    program: Program, platforms: tuple[str, ...], batch_size: int | None, *, inside: bool
) -> jax_export.Exported:
    batch = batch_size if batch_size is not None else jax_export.symbolic_shape("batch")[0]
    inputs = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in program.inputs.values()]

    def call(params, *inputs):
        results = program.function(params, *inputs)
        return results[0] if len(results) == 1 else results

    if inside:
        constants = {name: np.asarray(array) for name, array in program.params.items()}
        return jax_export.export(jax.jit(lambda *inputs: call(constants, *inputs)), platforms=platforms)(*inputs)
    params = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in program.params.items()}
    return jax_export.export(jax.jit(call), platforms=platforms)(params, *inputs)


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Programs do not name the files and lines that they come from: these are paths on this machine."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def beside(path: epath.Path) -> epath.Path:
    """Where the weights of a program lie that has them beside it."""
    return path.with_suffix(".npz")


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedProgram:
    """A program that was read from a file.

    Attributes:
        exported: what `jax.export` makes of it: `exported.mlir_module_serialized` has the StableHLO for other runtimes.
        weights: the program's weights by name, if they lie beside it; None: they are inside.
        metadata: what the file says: model, inputs, preparation of images, names of classes.
    """

    exported: jax_export.Exported
    weights: Mapping[str, jax.Array] | None
    metadata: Mapping[str, Any]

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """The program's result for the inputs that its metadata describes.

        Raises:
            UserError: number, shapes or dtypes of the inputs do not fit.
        """
        expected = self.metadata["inputs"]
        if len(inputs) != len(expected):
            raise UserError(f"{len(inputs)} arrays, expected {', '.join(expected)}")
        inputs = [array if hasattr(array, "dtype") else np.asarray(array) for array in inputs]
        for array, (name, spec) in zip(inputs, expected.items(), strict=True):
            if not array.shape or array.shape[1:] != tuple(spec["shape"][1:]) or array.dtype.name != spec["dtype"]:
                shape = ", ".join(map(str, spec["shape"]))
                raise UserError(f"{name}: {array.dtype} {array.shape}, expected {spec['dtype']} ({shape})")
        batches = {array.shape[0] for array in inputs}
        if len(batches) > 1 or 0 in batches:
            found = ", ".join(f"{array.shape[0]} {name}" for array, name in zip(inputs, expected, strict=True))
            raise UserError(f"{found}: expected at least 1, and as many of each")
        if (fixed := self.metadata["batch_size"]) is not None and batches != {fixed}:
            raise UserError(f"a batch of {batches.pop()}: the program was exported for batches of {fixed}")
        if self.weights is None:
            return self.exported.call(*inputs)
        return self.exported.call(self.weights, *inputs)


def load_stablehlo(path: epath.PathLike) -> LoadedProgram:
    """Reads a file that `stablehlo` wrote, and the weights beside it if they are.

    `jax.jit(load_stablehlo(path))` compiles it once for each batch size.

    Raises:
        UserError: there is no such file, it is of another kind or version, it is damaged, or this version of JAX cannot
            read it.
    """
    name, path = os.fspath(path), paths.given(path, "path")
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            metadata, content = json.loads(archive.read(_METADATA)), archive.read(_PROGRAM)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}", argument="path") from error
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(
            f"{name} is damaged, or no program that `polaformer export --format stablehlo` wrote ({error})",
            argument="path",
        ) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise UserError(
            f"{name} has the format {found!r}, expected {FORMAT!r}: another version of polaformer_jax wrote it; export"
            " it again with this one, or read it with that",
            argument="path",
        )
    try:
        exported = jax_export.deserialize(bytearray(content))
    except Exception as error:  # of flatbuffers, or of JAX
        raise UserError(
            f"{name} was written with JAX {metadata.get('jax')} (calling convention"
            f" {metadata.get('calling_convention')}), and JAX {jax.__version__} cannot read it ({error}): export it"
            " again",
            argument="path",
        ) from error
    weights = _read_weights(path, exported) if metadata.get("weights") == "beside" else None
    return LoadedProgram(exported, weights, metadata)


def _read_weights(path: epath.Path, exported: jax_export.Exported) -> Mapping[str, jax.Array]:
    place = beside(path)
    (expected, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    # np.load and what it is built on raise all of these on damaged files; what it returns for a .npy has no `with`.
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"the weights of {path}, {place}, cannot be read: {error}") from error
    wrong = [
        name
        for name in sorted(expected.keys() | found.keys())
        if name not in expected
        or name not in found
        or (found[name].shape, found[name].dtype) != (expected[name].shape, expected[name].dtype)
    ]
    if wrong:
        raise UserError(
            f"{place} does not hold the weights of {path}: {', '.join(wrong[:3])}{' ...' if wrong[3:] else ''} are"
            " missing, unexpected, or of another shape or type"
        )
    return {name: jax.numpy.asarray(array) for name, array in found.items()}
