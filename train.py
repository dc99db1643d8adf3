"""Trains a model: the command `polaformer train`."""

import sys

from polaformer_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
