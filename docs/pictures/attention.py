"""Draws attention.png: a photograph beside both streams of a linear block, for one token of a small trained model.

    python -m pip install -e ".[train]" "scikit-image==0.26.0"
    python docs/pictures/attention.py --workdir runs/attention --output docs/pictures/attention.png

The model is `pola_pvt_nano` at 96 pixels, trained from random weights by the project's own training loop to tell from
which of 18 photographs and micrographs of the scikit-image wheel a crop is taken: training crops from the left 70 % of
each, validation crops from the right 30 %. Ten epochs, 600 steps, took eight minutes of processor time on two cores and
reach 72 % of the 360 validation crops (guessing: 6 %). For the picture its position tables are resized to 192 pixels,
where the first stage has 48x48 tokens. A run that was stopped resumes; a finished one is only drawn.

The photograph that is shown is `skimage.data.chelsea()` by Stefan van der Walt, CC0 1.0. Of the others nothing is kept.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage.data
from matplotlib.patches import Rectangle
from PIL import Image

import polaformer_jax as pf
from polaformer_jax.analysis.attention_maps import AttentionMaps
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.files import figures
from polaformer_jax.files.figures import FAINT, INK
from polaformer_jax.inference.pictures import COLOURS, MARK, TITLES
from polaformer_jax.models.model_config import STRIDES
from polaformer_jax.training import export, loop, progress, recipes

# Public domain or CC0, or without known copyright restrictions; all of them are files of the wheel itself.
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "clock", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket", "stereo_motorcycle", "text"),
)
SIZE, SHOWN = 96, 192  # pixels of the model's input, in training and in the picture
STAGE, BLOCK, TOKEN = 0, 0, (26, 24)  # what is shown: a token on the dark edge of the nose
TRAIN_CROPS, VAL_CROPS = 100, 20  # of each photograph


def photograph(name: str) -> Image.Image:
    pixels = getattr(skimage.data, name)()
    return Image.fromarray(pixels[0] if name == "stereo_motorcycle" else pixels).convert("RGB")


def square(image: Image.Image) -> Image.Image:
    """The largest square in the middle."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def write_crops(folder: Path) -> None:
    """`folder/{train,val}/NAME/*.png`: random squares, from disjoint parts of the photographs."""
    random = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        image = photograph(name)
        border = round(0.7 * image.width)
        for split, left, right, count in (
            ("train", 0, border, TRAIN_CROPS),
            ("val", border, image.width, VAL_CROPS),
        ):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            largest = min(right - left, image.height)
            for index in range(count):
                side = int(largest * random.uniform(0.5, 1))
                x, y = random.integers(left, right - side + 1), random.integers(0, image.height - side + 1)
                crop = image.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                crop.save(place / f"{index:03}.png")


def train(workdir: Path, *, epochs: float) -> Path:
    """Trains, or resumes a training, and returns the file of the best weights."""
    if not (workdir / "crops").exists():
        write_crops(workdir / "crops")
    config = recipes.load("digits:pvt")
    with config.unlocked():
        config.data.source, config.data.name, config.data.data_dir = "folder", "crops", str(workdir / "crops")
        config.data.eval_split, config.data.workers = "val", 1
        config.model.num_classes = None
        config.model.img_size = config.eval.resize = config.eval.crop = SIZE
        config.augment.crop_area, config.augment.flip = (0.3, 1.0), 0.5
        config.train.epochs, config.train.batch_size, config.eval.batch_size = epochs, 30, 60
        config.optimizer.lr_base_batch = 30
        config.eval.every, config.schedule.warmup, config.log.pictures = 2.0, 1.0, False
    result = loop.train(config, workdir / "run")
    print(f"validation: {100 * result.evaluation.metrics['accuracy']:.1f} % of {result.evaluation.counted} crops")
    export.export(workdir / "run", workdir / "crops.safetensors")
    return workdir / "crops.safetensors"


def draw(image: np.ndarray, maps: AttentionMaps) -> figures.Figure:
    """The image with its token, and the weights of that token in both streams, the mean of the heads."""
    figure = figures.new(8.0, 3.0, pad=0.06)
    cell = STRIDES[STAGE] * image.shape[0] / SHOWN
    for axes, name in zip(figure.subplots(1, 3), ("image", "same", "opposite"), strict=True):
        place = {"extent": (0, image.shape[1], image.shape[0], 0)}
        if name == "image":
            axes.imshow(image, **place)
        else:
            weights = maps.streams[name].weights[0].mean(axis=0)
            axes.imshow(weights / weights.mean(), cmap=COLOURS, interpolation="nearest", **place)
        axes.set_title(TITLES.get(name, name), fontsize=11, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(FAINT)
        corner = TOKEN[1] * cell, TOKEN[0] * cell
        axes.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=MARK, linewidth=2))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/attention"))
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/attention.png"))
    parser.add_argument("--epochs", type=float, default=10.0)
    args = parser.parse_args()
    progress.set_up_logging()
    args.workdir.mkdir(parents=True, exist_ok=True)

    weights = train(args.workdir, epochs=args.epochs)
    model = pf.create_model(weights=weights, img_size=SHOWN)  # resizes the position tables
    image = np.asarray(square(photograph("chelsea")).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC))
    maps = pf.attention_maps(model, normalise(image[None]), stage=STAGE, block=BLOCK, token=TOKEN)
    figures.save(draw(image, maps), args.output)


if __name__ == "__main__":
    main()
