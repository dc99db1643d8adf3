"""The families of image backbones by name."""

from polaformer_jax.models.model_config import ModelConfig
from polaformer_jax.models.pola_pp import PolaPP
from polaformer_jax.models.pola_pvt import PolaPVT
from polaformer_jax.models.pola_swin import PolaSwin

ImageModel = PolaPVT | PolaSwin | PolaPP
BACKBONES: dict[str, type[ImageModel]] = {cls.Config.family: cls for cls in (PolaPVT, PolaSwin, PolaPP)}


def config_of(family: str, fields: dict[str, object]) -> ModelConfig:
    """The config of a family of backbones.

    Raises:
        ValueError: there is no such family.
        UserError: the fields do not fit.
    """
    if family not in BACKBONES:
        raise ValueError(f"backbone of family {family!r}, expected one of {', '.join(BACKBONES)}")
    return BACKBONES[family].Config(**fields)
