"""Where several trained image models look on the same images: a row for each image, a column for each attention."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from polaformer_jax.analysis.attention_maps import attention_maps
from polaformer_jax.analysis.entropy import load_run
from polaformer_jax.analysis.image_entropy import images_of
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures, paths
from polaformer_jax.models.model_config import STRIDES
from polaformer_jax.training.workdir import read_config

IMAGES = 5  # rows
STAGE = 0  # the one with the most tokens; its last block is shown


def check(workdirs: Sequence[epath.PathLike]) -> None:
    """Raises a UserError, before any work, if a run trained no image classifier."""
    for workdir in workdirs:
        config = read_config(workdir)
        if config.task.name != "image":
            raise UserError(f"{workdir} trained the task {config.task.name}: maps are of image models", argument="maps")


def draw(workdirs: Sequence[epath.PathLike], *, data_dir: str | None = None) -> Figure:
    """The attention of the token in the middle of the image, in the last block of the first stage, mean of the heads.

    Each map has its own scale, from zero to its greatest weight, which is given in units of uniform attention.

    Raises:
        UserError: see `load_run`; or a run trained no image model, or has other test images than the first.
    """
    check(workdirs)
    columns, images = [], None
    for workdir in workdirs:
        experiment, params = load_run(workdir, data_dir)
        model = experiment.model(params)
        own = images_of(experiment, IMAGES)
        if images is not None and not np.array_equal(images, own):
            raise UserError(
                f"{workdir} has other test images than {workdirs[0]}: {experiment.config.data.name} of"
                f" {model.config.img_size} pixels; give runs on the same images",
                argument="maps",
            )
        images = own
        side = model.config.img_size // STRIDES[STAGE]
        found = attention_maps(model, normalise(images), stage=STAGE, token=(side // 2, side // 2))
        keys = np.exp(found.uniform_entropy)  # within the token's reach
        name = figures.plain(paths.given(workdir, "workdir").name)
        columns += [
            (f"{name}\n{kind}", stream.weights.mean(1) * keys, stream.entropy.mean(1) / found.uniform_entropy)
            for kind, stream in found.streams.items()
        ]
    figure = figures.new(1.75 * (1 + len(columns)), 2.0 * len(images) + 0.4, pad=0.03)
    size, stride = images.shape[1], STRIDES[STAGE]
    place = {"extent": (0, size, size, 0), "interpolation": "nearest"}  # one token, one flat square
    for i, panels in enumerate(figure.subplots(len(images), 1 + len(columns), squeeze=False)):
        panels[0].imshow(images[i], **place)
        for axes, (name, maps, entropy) in zip(panels[1:], columns, strict=True):
            axes.imshow(maps[i], cmap="viridis", vmin=0, **place)
            title = f"max {maps[i].max():.1f}, entropy {entropy[i]:.2f}"
            axes.set_title(f"{name}\n{title}" if i == 0 else title, fontsize=8, color=figures.INK)
        for axes in panels:
            corner = size // stride // 2 * stride
            axes.add_patch(Rectangle((corner, corner), stride, stride, fill=False, edgecolor="#e4572e", linewidth=1.4))
            axes.set_axis_off()
    return figure
