"""Options of XLA for programs that run once: a quarter of the time to compile, and the same results but for rounding.

As a script it prints them for XLA_FLAGS, as the quick tests have them; see the Makefile.
"""

import importlib.metadata

# Options for `jax.jit`.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):  # which has no such option
    QUICK["xla_cpu_use_fusion_emitters"] = False

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())

if __name__ == "__main__":
    print(FLAGS)
