"""Converts official PyTorch checkpoints: the command `polaformer convert`."""

import sys

from polaformer_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
