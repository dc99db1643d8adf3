"""A process that compiles a segmenter for one size of images, or times it: started by `image_size.py`.

    python -m polaformer_jax.benchmark.image_size_worker < question.json

A process of its own, since the most memory that a process has held is that of its largest program. It does not call
`keep_freed_memory`, unlike other benchmarks: freed memory that is kept may be in pieces too small for the next call, so
that the process grows to three times of what its program needs, and large images do not fit.
"""

import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.benchmark import programs
from polaformer_jax.benchmark.image_size_case import Case
from polaformer_jax.benchmark.sweep import Job
from polaformer_jax.benchmark.timing import seconds_of
from polaformer_jax.hardware import host_memory
from polaformer_jax.hardware.costs import is_out_of_memory
from polaformer_jax.models import registry

_SEED = 0


def job(case: Case) -> Job:
    """Logits in evaluation; or ("gradient") the mean of their squares in training, and its gradients."""

    def make_model():
        return registry.create(case.config(), dtype=jnp.dtype(case.dtype), rngs=nnx.Rngs(_SEED))

    graphdef, *_ = nnx.split(nnx.eval_shape(make_model), nnx.Param, ...)

    def forward(params, rest, images):
        return nnx.merge(graphdef, params, rest)(images).logits

    def loss(params, rest, images):
        context = {"train": True, "rngs": nnx.Rngs(dropout=jax.random.key(_SEED)), "mask": jnp.ones(1, bool)}
        return jnp.mean(jnp.square(nnx.merge(graphdef, params, rest)(images, **context).logits))

    def make_arguments():
        _, params, rest = nnx.split(make_model(), nnx.Param, ...)
        images = jax.random.normal(jax.random.key(_SEED), (1, case.img_size, case.img_size, 3))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest), images

    def start(program: jax.stages.Compiled) -> Callable[[], object]:
        given = make_arguments()
        return lambda: program(*given)

    function = jax.jit(forward if case.mode == "forward" else jax.value_and_grad(loss))
    return Job(lambda: function.trace(*jax.eval_shape(make_arguments)), start)


def compiled(case: Case, *, memory_gib: float | None) -> dict[str, object]:
    """What the compiler reports, in bytes and seconds, by the names of `Program`'s fields.

    Args:
        memory_gib: see `programs.memory_limit`.
    """
    device = jax.devices()[0]
    answer = {"limit": programs.memory_limit(memory_gib), "device": device.device_kind, "jax": jax.__version__}
    try:
        program = programs.compiled(job(case).trace)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {**answer, "memory": None, "seconds": None, "flops": None}
    return {**answer, "memory": program.memory, "seconds": program.seconds, "flops": program.flops}


def timed(case: Case, *, calls: int, seconds: float) -> dict[str, object]:
    """The "seconds" of each call, at least so many and for so long in all; and the "peak" of the memory, in bytes.

    The peak is that of the device if it reports one, otherwise that of this process.
    """
    given = job(case)
    call = given.start(programs.compiled(given.trace).run)
    jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < calls or sum(times) < seconds:
        times.append(seconds_of(call))
    if stats := jax.devices()[0].memory_stats():
        return {"seconds": times, "peak": stats["peak_bytes_in_use"], "peak_by": "device"}
    return {"seconds": times, "peak": host_memory.peak(), "peak_by": "process"}


def main(question: dict) -> None:
    jax.config.update("jax_compilation_cache_dir", question["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    case = Case(**question["case"])
    answers = {"compiled": compiled, "timed": timed}
    print(json.dumps(answers[question["what"]](case, **question["given"])))


if __name__ == "__main__":
    main(json.loads(sys.stdin.read()))
