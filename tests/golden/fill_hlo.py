"""Writes the texts of small programs compiled for TPUs and GPUs (tests/golden/hlo), whose memory traffic is known.

    python -m tests.golden.fill_hlo v5e:2x2      # needs libtpu, no TPU
    python -m tests.golden.fill_hlo h100         # needs JAX's plugin for CUDA, no GPU

What the traffic does not depend on is cut out: stack frames, shardings, code of kernels, most options of the back ends.
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

FOLDER = Path(__file__).parent / "hlo"
MIB = 2**20


def double(x):
    return 2 * x


def double_half(x):
    return 2 * x[: x.shape[0] // 2]


def layers(x, w, v):
    return jnp.tanh(x @ w) @ v


def update(x, y, i):
    return jax.lax.dynamic_update_slice(x, 2 * y, (i, 0, 0))


def scan(x):
    return jax.lax.scan(lambda carry, part: (carry, 2 * part), 0, x)[1]


def kernel(x):
    """Doubles x (N, 96), of which each block is read twice: the outer axis of the grid comes back to it."""

    def body(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    rows = 1024
    at = pl.BlockSpec((rows, x.shape[1]), lambda again, i: (i, 0))
    return pl.pallas_call(
        body,
        grid=(2, x.shape[0] // rows),
        in_specs=[at],
        out_specs=at,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        metadata={"reads": "2"},
        name="doubling",
    )(x)


# Functions, the shapes and dtypes of their arguments, and those that are donated.
PROGRAMS = {
    "double": (double, [((2048, 1024, 128), "bfloat16")], ()),
    "double_half": (double_half, [((2048, 1024, 128), "bfloat16")], ()),
    "layers": (layers, [((1024, 256), "bfloat16")] + 2 * [((256, 256), "bfloat16")], ()),
    "update": (update, [((2048, 1024, 128), "bfloat16"), ((4, 1024, 128), "bfloat16"), ((), "int32")], (0,)),
    "scan": (scan, [((24, 4096, 1024), "float32")], ()),
    "kernel": (kernel, [((2**21, 96), "bfloat16")], ()),
}


def compiled(topology: str, name: str) -> str:
    """The text of a program, compiled for one device of a topology."""
    from polaformer_jax.aot.topologies import compiler_options, topology_devices

    devices = topology_devices(topology)[:1]
    placed = jax.sharding.SingleDeviceSharding(devices[0])
    function, arguments, donated = PROGRAMS[name]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=placed) for shape, dtype in arguments]
    lowered = jax.jit(function, donate_argnums=donated).lower(*shapes)
    return lowered.compile(compiler_options(devices)[0]).as_text()


def shortened(text: str) -> str:
    """Without what the traffic does not depend on."""
    text = re.sub(r"^FileNames$.*?(?=^(?:%|ENTRY))", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r'"body":"[^"]*"', '"body":""', text)
    text = re.sub(r", sharding=\{[^}]*\}", "", text)
    text = re.sub(r', frontend_attributes=\{(?:xla|arg_layout)[^"]*"[^"]*"[^}]*\}+', "", text)
    text = re.sub(r' (?:scheduling_name|deduplicated_name)="[^"]*"| stack_frame_id=\d+', "", text)
    keep = re.compile("known_trip_count|cost_estimate")
    lines = (line if keep.search(line) else re.sub(r", backend_config=.*", "", line) for line in text.splitlines())
    return "\n".join(lines) + "\n"


def main(topology: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    for name in PROGRAMS:
        if name == "kernel" and not topology.startswith("v"):
            continue
        (FOLDER / f"{topology.partition(':')[0]}_{name}.txt").write_text(shortened(compiled(topology, name)))


if __name__ == "__main__":
    main(*sys.argv[1:])
