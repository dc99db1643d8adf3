"""Where several trained image models look on the same images: a row for each image, a column for each attention."""

from collections.abc import Sequence

from etils import epath
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from polaformer_jax.analysis.attention_maps import attention_maps
from polaformer_jax.analysis.entropy import load_run
from polaformer_jax.analysis.image_entropy import images_of
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures, paths
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.model_config import STRIDES

IMAGES = 5  # rows
STAGE = 0  # the one with the most tokens; its last block is shown


def draw(workdirs: Sequence[epath.PathLike], *, data_dir: str | None = None) -> Figure:
    """The attention of the token in the middle of the image, in the last block of the first stage, mean of the heads.

    Each map has its own scale, from zero to its greatest weight, which is given in units of uniform attention.

    Raises:
        UserError: see `load_run`; or a run trained no image model, or another image size than the first.
    """
    columns, images = [], None
    for workdir in workdirs:
        experiment, params = load_run(workdir, data_dir)
        model = experiment.model(params)
        if not isinstance(model, Backbone):
            raise UserError(f"{workdir} trained a {type(model).__name__}: maps are of image models", argument="maps")
        own = images_of(experiment, IMAGES)
        if images is not None and images.shape != own.shape:
            raise UserError(f"{workdir} has other images than {workdirs[0]}: {own.shape}, expected {images.shape}")
        images = own
        side = model.config.img_size // STRIDES[STAGE]
        found = attention_maps(model, normalise(images), stage=STAGE, token=(side // 2, side // 2))
        name = figures.plain(paths.given(workdir, "workdir").name)
        columns += [
            (f"{name}\n{kind}", stream.weights.mean(1) * side**2, stream.entropy.mean(1) / found.uniform_entropy)
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
