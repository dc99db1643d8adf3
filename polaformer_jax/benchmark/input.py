"""Speed of the training input: each stage, the whole pipeline, a bare loop for comparison, and the official pipeline.

    polaformer benchmark input
    polaformer benchmark input --official ~/PolaFormer --csv input.csv

The images are cut from scikit-learn's two photographs, at ImageNet's size and quality, so nothing is fetched.
Measurements take turns, and medians are reported. There are two rates: images per second of elapsed time, and per
second of processor time, which other programs on the machine disturb less.
"""

import argparse
import importlib.util
import io
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from polaformer_jax.errors import UserError
from polaformer_jax.files import paths, tables
from polaformer_jax.training import recipes

STAGES = ("read", "decode", "crop", "augment", "batch", "transfer")
_SIZE = (500, 375)  # the commonest size of ImageNet's images
_QUALITY = (92, 97)  # of the JPEG files, upper end excluded
_TRIES = 5  # of the official transform, per image
_SEED = 0


class Rate(NamedTuple):
    """A median over the repetitions.

    Attributes:
        name: what was measured.
        clock: images per second of elapsed time.
        cpu: images per second of processor time of this process; None if another process does the work.
    """

    name: str
    clock: float
    cpu: float | None


class _Seconds(NamedTuple):
    """Seconds that one repetition took for all its images."""

    clock: float
    cpu: float


def make_photographs(folder: str | os.PathLike, count: int) -> None:
    """Writes `count` different JPEG files as `folder/train/CLASS/*.jpeg`, of two classes: the photographs.

    Each shows another part of a photograph, mirrored or not, of 500 by 375 pixels.
    """
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(_SEED)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for number in tqdm(range(count), desc="making images", unit="image", disable=None, leave=False):
        label = number % len(photographs)
        whole = photographs[label]
        # With the aspect ratio of the result, and not enlarged, since enlarged images compress too well.
        height = rng.uniform(_SIZE[1], whole.height)
        width = height * _SIZE[0] / _SIZE[1]
        left, top = rng.uniform(0, whole.width - width), rng.uniform(0, whole.height - height)
        image = whole.resize(_SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = Path(folder) / "train" / f"photograph_{label}" / f"{number:06d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=int(rng.integers(*_QUALITY)))


def measure(config, *, images: int, batch_size: int, repetitions: int, official: str | None = None) -> list[Rate]:
    """Measures everything on `images` images.

    Args:
        config: a config, of which `augment` and `model.img_size` are used.
        batch_size: images in a batch; the images are rounded down to whole batches.
        repetitions: number of repetitions of all measurements, taking turns.
        official: path of a checkout of the official code to measure next to ours.

    Raises:
        UserError: an argument is not valid, or the official code does not import.
    """
    if not 1 <= batch_size <= images or repetitions < 1:
        raise UserError(
            f"images is {images}, batch size {batch_size}, repetitions {repetitions}: expected at least 1 repetition, "
            "a batch of at least 1, and at least as many images"
        )
    from polaformer_jax.data.images.transforms import train_transform
    from polaformer_jax.data.sources import open_source

    theirs = None if official is None else official_transform(official, config)  # fails before anything is measured
    batches = images // batch_size
    with tempfile.TemporaryDirectory(prefix="benchmark_input_") as folder:
        make_photographs(folder, batches * batch_size)
        data = types.SimpleNamespace(source="folder", name="photographs", data_dir=folder, train_split="train")
        source, transform = open_source(data, "train"), train_transform(config)
        found: dict[str, list[_Seconds]] = {}
        alone: dict[str, Callable[[], _Seconds]] = {
            "decode + crop + augment, bare loop": lambda: _bare_loop(source, transform),
            "pipeline, 0 workers": lambda: _pipeline(source, transform, batches, batch_size, workers=0),
            "pipeline, 1 worker": lambda: _pipeline(source, transform, batches, batch_size, workers=1),
        }
        if theirs is not None:
            alone["official, image by image"] = lambda: _official_loop(source, theirs)
        with tqdm(total=repetitions * (1 + len(alone)), desc="measuring", disable=None, leave=False) as bar:
            for _ in range(repetitions):
                for stage, seconds in _stages(source, transform, batch_size).items():
                    found.setdefault(stage, []).append(seconds)
                bar.update()
                for name, run in alone.items():
                    found.setdefault(name, []).append(run())
                    bar.update()
    count = batches * batch_size
    rates = []
    for name, seconds in found.items():
        clock, cpu = (statistics.median(values) for values in zip(*seconds, strict=True))
        rates.append(Rate(name, count / clock, None if "1 worker" in name else count / max(cpu, 1e-9)))
    return rates


def _stages(source, transform, batch_size: int) -> dict[str, _Seconds]:
    """Passes all images through the stages one after the other, as the pipeline does, and times each stage."""
    import jax

    from polaformer_jax.data.images import transforms
    from polaformer_jax.data.images.rand_augment import RandAugment

    augment = transform.rand_augment and RandAugment.parse(transform.rand_augment)
    total = {stage: np.zeros(2) for stage in STAGES}
    examples = []

    def lap(stage: str, before: np.ndarray) -> np.ndarray:
        now = _now()
        total[stage] += now - before
        return now

    for index, rng in enumerate(_generators(len(source))):
        begin = _now()
        record = source[index]
        begin = lap("read", begin)
        image = transforms.decode(record["image"])
        begin = lap("decode", begin)
        image = transforms.random_resized_crop(
            image, transform.image_size, rng, area=transform.crop_area, aspect=transform.crop_aspect
        )
        image = transforms.random_flip(image, rng, probability=transform.flip)
        begin = lap("crop", begin)
        if augment:
            image = augment(image, rng)
        begin = lap("augment", begin)
        examples.append(image)
        if len(examples) == batch_size:
            batch = np.stack(examples)
            examples = []
            begin = lap("batch", begin)
            jax.block_until_ready(jax.device_put(batch))
            lap("transfer", begin)
        else:
            lap("batch", begin)
    return {stage: _Seconds(*seconds) for stage, seconds in total.items()}


def _bare_loop(source, transform) -> _Seconds:
    """Decode, crop, flip and RandAugment of files in memory, and nothing else."""
    records = [source[index] for index in range(len(source))]
    begin = _now()
    for record, rng in zip(records, _generators(len(records)), strict=True):
        transform(record, rng)
    return _Seconds(*(_now() - begin))


def _pipeline(source, transform, batches: int, batch_size: int, *, workers: int) -> _Seconds:
    """The training's own batches, after the first one."""
    from polaformer_jax.data.pipeline import train_batches

    stream = train_batches(source, transform, batch_size=batch_size, seed=_SEED, workers=workers, prefetch=1)
    try:
        # Batches are requested without a pause, so the worker is always behind: no timed batch was made before.
        next(stream)
        begin = _now()
        for _ in range(batches):
            next(stream)
        return _Seconds(*(_now() - begin))
    finally:
        stream.close()


def official_transform(path: str, config) -> Callable[[Image.Image], object]:
    """The transform of training images that a checkout of the official code builds, with the values of our config.

    Args:
        path: path of the checkout. Its `data` package is imported: only give one that you trust.

    Raises:
        UserError: there is no such checkout, or it does not import.
    """
    folder = Path(paths.given(path, "official")) / "data"
    if not (folder / "build.py").is_file():
        raise UserError(f"--official {path}: there is no data/build.py in it; expected a checkout of the official code")
    name = "_official_data"  # not `data`, which may be another package here
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = types.ModuleType(name)  # its own __init__ is not needed
    package.__path__ = [str(folder)]
    package.__spec__ = spec
    sys.modules[name] = package
    try:
        build = importlib.import_module(f"{name}.build")
    except Exception as error:  # an old timm on a new PyTorch fails in more ways than ImportError
        raise UserError(
            f"--official {path}: its data/build.py does not import here: {type(error).__name__}: {error}. It needs "
            "torch, torchvision and timm as its README says (timm 0.4.12), installed together with this package"
        ) from error
    import torch

    torch.set_num_threads(1)  # as in the workers of a DataLoader
    augment = config.augment
    return build.build_transform(
        True,
        types.SimpleNamespace(
            DATA=types.SimpleNamespace(IMG_SIZE=config.model.img_size, INTERPOLATION="bicubic"),
            AUG=types.SimpleNamespace(
                COLOR_JITTER=0.0,
                AUTO_AUGMENT=augment.rand_augment or "none",
                REPROB=augment.erase_prob,
                REMODE="pixel",
                RECOUNT=1,
            ),
        ),
    )


def _official_loop(source, transform) -> _Seconds:
    """Image by image from files in memory to a float tensor; decoded as torchvision's ImageFolder does.

    timm 0.4.12 may request to keep no bit of a colour, which new versions of Pillow refuse: then it is tried again.
    """
    records = [source[index]["image"] for index in range(len(source))]
    begin = _now()
    for data in records:
        for tries_left in reversed(range(_TRIES)):
            try:
                transform(Image.open(io.BytesIO(data)).convert("RGB"))
                break
            except Exception as error:
                if not tries_left:
                    raise UserError(f"--official: its transform fails: {type(error).__name__}: {error}") from error
    return _Seconds(*(_now() - begin))


def _now() -> np.ndarray:
    """(2,) seconds: elapsed time, and processor time of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def _generators(count: int) -> Iterator[np.random.Generator]:
    """Generators as Grain creates them for `random_map`: one for each image."""
    return (np.random.Generator(np.random.Philox(key=(_SEED << 64) + index)) for index in range(count))


def table(rates: list[Rate]) -> str:
    """All rates, then the rate of the pipeline relative to the bare loop and to the official code."""
    by_name = {rate.name: rate for rate in rates}
    width = max(len(name) for name in by_name)
    lines = [f"{'':{width}}  {'ms/image':>9}  {'images/s':>9}  {'per CPU s':>9}"]
    for rate in rates:
        cpu = "" if rate.cpu is None else f"{rate.cpu:,.0f}"
        lines.append(f"{rate.name:{width}}  {1000 / rate.clock:9.3f}  {rate.clock:9,.0f}  {cpu:>9}".rstrip())
    for mine in ("pipeline, 0 workers", "pipeline, 1 worker"):
        for other in ("decode + crop + augment, bare loop", "official, image by image"):
            if mine in by_name and other in by_name:
                lines.append(f"{mine}: {by_name[mine].clock / by_name[other].clock:.2f} x {other}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=256, help="images in each repetition [256]")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch [64]")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="number of repetitions, whose median is reported [5]"
    )
    parser.add_argument("--config", default="pola_swin:t", help="recipe [pola_swin:t]")
    parser.add_argument("--official", metavar="PATH", help="checkout of the official code, to measure next to ours")
    parser.add_argument("--csv", metavar="FILE", help="file to write the rates to")


def main(args: argparse.Namespace) -> None:
    rates = measure(
        recipes.load(args.config),
        images=args.images,
        batch_size=args.batch_size,
        repetitions=args.repetitions,
        official=args.official,
    )
    print(table(rates))
    if args.csv:
        tables.write_csv(
            args.csv,
            [
                {
                    "name": rate.name,
                    "images_per_s": f"{rate.clock:.1f}",
                    "images_per_cpu_s": None if rate.cpu is None else f"{rate.cpu:.1f}",
                }
                for rate in rates
            ],
        )
