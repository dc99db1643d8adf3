"""What is known of a model besides the function that it computes: names of its classes, preparation of its inputs."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a file of weights says of a model besides its config and its parameters; `model.info`.

    None of it changes what the model computes: all infos are equal, so that models that differ in nothing else share
    their compiled programs.

    Attributes:
        class_names: in label order; for ImageNet-1k the WordNet numbers, as in the data (`weights.imagenet` has words).
            None: not known.
        preprocess: how images are prepared, `{"resize": 256, "crop": 224}` in pixels; None: by the official rule.
        facts: where the weights come from: data, step, accuracy.
        other: further metadata, as text.
    """

    class_names: tuple[str, ...] | None = dataclasses.field(default=None, compare=False)
    preprocess: Mapping[str, int] | None = dataclasses.field(default=None, compare=False)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    other: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
