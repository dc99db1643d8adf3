"""Models that leave Python: repositories on the Hugging Face Hub, and programs that run without this package."""

from polaformer_jax.export.repository import push_to_hub

__all__ = ["push_to_hub"]
