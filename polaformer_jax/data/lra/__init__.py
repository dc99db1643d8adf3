"""The data of the Long Range Arena: sequences of tokens with a class, from five tasks.

`source.open_source` reads what `polaformer prepare lra_NAME` has written. Source of the tasks:
Tay et al., "Long Range Arena: A Benchmark for Efficient Transformers" (ICLR 2021, arXiv 2011.04006).
"""

from polaformer_jax.data.lra.source import SequenceSource, open_source

__all__ = ["SequenceSource", "open_source"]
