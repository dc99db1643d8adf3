"""Options of XLA for programs that run once: a quarter of the time to compile, and the same results but for rounding.

As a script it prints them for XLA_FLAGS, as all tests have them; see the Makefile.
"""

import importlib.metadata

# Options for `jax.jit`; and those that undo them, where the programs of users are tested.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
AS_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):  # which has no such option
    QUICK["xla_cpu_use_fusion_emitters"] = False
    AS_USERS["xla_cpu_use_fusion_emitters"] = True

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())

if __name__ == "__main__":
    print(FLAGS)
