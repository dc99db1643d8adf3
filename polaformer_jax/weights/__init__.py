"""Exchange of weights: official PyTorch checkpoints and safetensors, read strictly and written atomically.

`load_weights` and `save_weights` act on a model, `read_file` only on a file. `check`, `place` and `flatten` act on pure
dicts of parameters (`nnx.to_pure_dict`), as training holds them.
"""

from polaformer_jax.errors import WeightsError
from polaformer_jax.weights.files import Layout, WeightsFile, read_file
from polaformer_jax.weights.fitting import Change, Fit, summary
from polaformer_jax.weights.identify import Identity, identify, num_classes_of, stored_arguments
from polaformer_jax.weights.loading import family_of, load_weights, params_from
from polaformer_jax.weights.official import in_official_layout, to_torch
from polaformer_jax.weights.params import Checked, check, flatten, from_torch, place, shapes, unflatten
from polaformer_jax.weights.rules import UNUSED
from polaformer_jax.weights.saving import check_suffix, model_metadata, save_weights, write_file

__all__ = [
    "UNUSED",
    "Change",
    "Checked",
    "Fit",
    "Identity",
    "Layout",
    "WeightsError",
    "WeightsFile",
    "check",
    "check_suffix",
    "family_of",
    "flatten",
    "from_torch",
    "identify",
    "in_official_layout",
    "load_weights",
    "model_metadata",
    "num_classes_of",
    "params_from",
    "place",
    "read_file",
    "save_weights",
    "shapes",
    "stored_arguments",
    "summary",
    "to_torch",
    "unflatten",
    "write_file",
]
