"""A process that evaluates one batch and prints the platform: started and timed by `start.py`, with a case as JSON."""

import json
import sys


def main(given: dict) -> None:
    import jax

    from polaformer_jax.hardware.host_memory import keep_freed_memory

    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", given["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import polaformer_jax as pf

    model = pf.create_model(
        given["model"], img_size=given["img_size"], dtype=jnp.dtype(given["dtype"]), rngs=nnx.Rngs(0)
    )
    size = given["img_size"]
    images = np.random.default_rng(0).standard_normal((given["batch"], size, size, 3), np.float32)
    graphdef, params = nnx.split(model)
    logits = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))(params, images)
    jax.block_until_ready(logits)
    print(jax.default_backend(), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
