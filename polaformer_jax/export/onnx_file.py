"""Writes a function as an ONNX file, which runtimes for many devices and languages read."""

import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from polaformer_jax.errors import UserError
from polaformer_jax.export import flat, onnx_patterns, onnx_plugins, onnx_weights
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
    import jax2onnx
    import onnx

    scope = jax.export.SymbolicScope()
    shapes = [
        jax.ShapeDtypeStruct(
            tuple(jax.export.symbolic_shape(size, scope=scope)[0] if isinstance(size, str) else size for size in shape), dtype
        )
        for shape, dtype in inputs.values()
    ]
    program = flat.flattened(function, shapes, onnx_patterns.rules())
    flat.refuse_other_types(program)
    replaced = onnx_patterns.replacements(program.jaxpr)
    converted = onnx_weights.with_weights(program, replaced, {id(array): name for name, array in weights.items()})
    onnx_plugins.register()
    model = jax2onnx.to_onnx(
        converted, shapes, opset=opset, input_names=list(inputs), output_names=list(outputs), normalization_mode="prefer_native"
    )
    del model.graph.value_info[:]
    for value, variable in zip(model.graph.output, program.jaxpr.outvars, strict=True):
        dims = [size if isinstance(size, int) else str(size) for size in variable.aval.shape]
        kind = onnx.helper.np_dtype_to_tensor_dtype(variable.aval.dtype)
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, dims))
    onnx.checker.check_model(model, full_check=True)
    with atomic.writing(path) as file:
        file.write(model.SerializeToString())
