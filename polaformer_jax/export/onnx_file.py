"""Writes a function as an ONNX file, which runtimes for many devices and languages read.

jax2onnx converts it (https://github.com/enpasos/jax2onnx), after the layers of the models have been recognised and are
single operations, with plugins that turn these into the ONNX nodes that are fast in ONNX Runtime.
"""

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from polaformer_jax.errors import UserError
from polaformer_jax.export import flat_program, onnx_patterns, onnx_plugins, onnx_weights
from polaformer_jax.files import atomic

OLDEST_OPSET = 21


def write(
    function: Callable,
    inputs: Mapping[str, tuple[Sequence[int | str], jnp.dtype]],
    path: str | os.PathLike,
    *,
    outputs: Sequence[str],
    weights: Mapping[str, jax.Array],
    metadata: Mapping[str, str],
    opset: int = OLDEST_OPSET,
) -> None:
    """Writes a function and its weights to one ONNX file, completely or not at all.

    Args:
        function: of arrays, without side effects. It returns an array or a tuple of arrays, and refers to its weights.
        inputs: the shapes and dtypes of the function's arguments, by the names that they have in the file. A size that
            is a text, such as "batch", is any size; equal texts are equal sizes.
        path: of the file, which ends in .onnx by convention. An existing file is replaced.
        outputs: names of the results.
        weights: arrays that the function refers to, by the names that they have in the file. The names of other
            constants are made up.
        metadata: texts to store in the file.
        opset: version of the ONNX operators, at least 21.

    Raises:
        UserError: jax2onnx is not installed or does not know the opset, something has no form in ONNX, or a float type
            is not float32.
    """
    if opset < OLDEST_OPSET:
        raise UserError(f"{opset}: files are written with ONNX opset {OLDEST_OPSET} or later", argument="opset")
    onnx, jax2onnx = _packages()
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UserError(f"{opset}: onnx {onnx.__version__} knows opsets up to {newest}", argument="opset")

    shapes = _shapes(inputs)
    try:
        program = flat_program.flattened(function, shapes, onnx_patterns.rules())
    except UserError:
        raise
    except (TypeError, ValueError, jax.errors.InconclusiveDimensionOperation) as error:
        raise UserError(
            f"the function cannot be traced for inputs of any size: {error}. Models of this package can, unless they "
            "run kernels: create them with attention_impl='xla'"
        ) from error
    flat_program.check_float32(program)
    if len(program.jaxpr.outvars) != len(outputs):
        raise ValueError(f"the function has {len(program.jaxpr.outvars)} results, but {len(outputs)} names are given")
    names = {id(array): name for name, array in weights.items()}
    converted = onnx_weights.with_weights(program, onnx_patterns.replacements(program.jaxpr), names)
    onnx_plugins.register()
    try:
        model = jax2onnx.to_onnx(
            converted,
            shapes,
            opset=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            model_name="polaformer",
        )
    except NotImplementedError as error:
        raise UserError(f"the model cannot be written as ONNX: {error}") from error
    _finish(onnx, model, program.jaxpr, metadata)
    onnx.checker.check_model(model, full_check=True)
    with atomic.reported("program", path), atomic.writing(path) as file:
        file.write(model.SerializeToString())


def _packages():
    try:
        import jax2onnx
        import onnx
    except ImportError as error:
        raise UserError(
            f'writing ONNX files needs {error.name}, which is not installed: pip install "polaformer_jax[onnx]", in an '
            "environment of its own, since jax2onnx requires an older orbax-checkpoint than training"
        ) from error
    return onnx, jax2onnx


def _shapes(inputs: Mapping[str, tuple[Sequence[int | str], jnp.dtype]]) -> list[jax.ShapeDtypeStruct]:
    scope = jax.export.SymbolicScope()

    def size(given: int | str):
        return jax.export.symbolic_shape(given, scope=scope)[0] if isinstance(given, str) else given

    return [jax.ShapeDtypeStruct(tuple(map(size, shape)), dtype) for shape, dtype in inputs.values()]


def _finish(onnx, model, jaxpr: core.Jaxpr, metadata: Mapping[str, str]) -> None:
    """Removes what the converter leaves over, and adds what the file says about itself."""
    graph = model.graph
    del graph.value_info[:]  # shapes and types of intermediate results; some are wrong, and runtimes infer them
    for value, variable in zip(graph.output, jaxpr.outvars, strict=True):  # these too
        sizes = [size if isinstance(size, int) else str(size) for size in variable.aval.shape]
        kind = onnx.helper.np_dtype_to_tensor_dtype(variable.aval.dtype)
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, sizes))
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for unused in [array for array in graph.initializer if array.name not in used]:
        graph.initializer.remove(unused)
    model.producer_name, model.producer_version = "polaformer_jax", importlib.metadata.version("polaformer_jax")
    onnx.helper.set_model_props(model, dict(metadata))
