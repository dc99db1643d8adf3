"""`python -m polaformer_jax.cli` is the command `polaformer`."""

import sys

from polaformer_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
