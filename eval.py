"""Evaluates a model: the command `polaformer eval`."""

import sys

from polaformer_jax.cli.eval import main

if __name__ == "__main__":
    sys.exit(main())
