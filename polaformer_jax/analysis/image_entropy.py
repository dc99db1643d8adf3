"""How concentrated attention is in trained image models: entropies of the attention rows, and maps of one token."""

from collections.abc import Iterator

import jax
import numpy as np

from polaformer_jax.analysis.attention_maps import AttentionMaps, attention_maps
from polaformer_jax.analysis.attention_rows import WITHOUT_POWER
from polaformer_jax.analysis.sequence_entropy import spread
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.model_config import STRIDES
from polaformer_jax.training.experiment import Experiment


def images_of(experiment: Experiment, examples: int) -> np.ndarray:
    """(examples, S, S, 3) uint8: test images, spread evenly over the split, as the model sees them in evaluation."""
    source = experiment.inputs.source(experiment.inputs.report_split)
    image_of = experiment.task.image_of(source)
    return np.stack([image_of(int(index)) for index in spread(len(source), examples)])


def of_model(experiment: Experiment, params, *, examples: int) -> dict[tuple[str, str], np.ndarray]:
    """The entropies of a trained model on test images.

    Args:
        experiment: of a training of an image model.
        params: the trained parameters.

    Returns:
        ("stage.block", attention) -> (examples, h): for each image and head the mean entropy of the attention rows
        (see `attention_maps.Stream`), as a fraction of log n. Polarity-aware attention is measured as it was trained,
        and with the power p = 1 in the measured block. Blocks of a single token have no entropy, and are left out.
    """
    model = experiment.model(params)
    images = normalise(images_of(experiment, examples))
    found = {}
    for stage in range(len(STRIDES)):
        for block in range(len(model.blocks(stage))):
            for suffix, maps in _of_block(model, images, stage, block):
                found |= {
                    (f"{stage}.{block}", f"{name}{suffix}"): stream.entropy / maps.uniform_entropy
                    for name, stream in maps.streams.items()
                    if maps.uniform_entropy > 0
                }
    return found


def _of_block(model: Backbone, images: jax.Array, stage: int, block: int) -> Iterator[tuple[str, AttentionMaps]]:
    """The maps as trained, and of polarity-aware attention those with the power p = 1, with what the name gets."""
    yield "", attention_maps(model, images, stage=stage, block=block)
    attn = model.blocks(stage)[block].attn
    if not isinstance(attn, PolarityAttention):
        return
    trained = attn.alpha
    attn.alpha = 0.0
    try:
        yield WITHOUT_POWER, attention_maps(model, images, stage=stage, block=block)
    finally:
        attn.alpha = trained
