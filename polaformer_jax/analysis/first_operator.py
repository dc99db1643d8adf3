"""What the first operator alone tells about the value of a ListOps expression: a figure to hold results against.

    python -m polaformer_jax.analysis.first_operator --data-dir data

An expression is answered by the commonest value of the training expressions that begin with the same operator: 0 for
MIN, 9 for MAX. A model is only as good as it is better than that.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from polaformer_jax.data.lra.facts import SPLITS
from polaformer_jax.data.lra.source import SequenceSource
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables


def right_answers(data_dir: str, task: str = "listops") -> dict[str, np.ndarray]:
    """By split, bool (examples,): which expressions are answered right by the first operator.

    Args:
        task: `listops` or `listops_short`.

    Raises:
        UserError: ListOps is not prepared there, or is damaged.
    """
    firsts, values = {}, {}
    for split in SPLITS:
        pairs = np.array(list(_first_and_value(data_dir, task, split)), np.int64).reshape(-1, 2)
        firsts[split], values[split] = pairs.T
    counts = np.zeros([1 + max(array.max(initial=0) for array in part.values()) for part in (firsts, values)], np.int64)
    np.add.at(counts, (firsts["train"], values["train"]), 1)
    answers = counts.argmax(axis=1)
    return {split: answers[firsts[split]] == values[split] for split in SPLITS}


def _first_and_value(data_dir: str, task: str, split: str) -> Iterator[tuple[int, int]]:
    source = SequenceSource(task, data_dir=data_dir, tokenisation="no_brackets", split=split)
    for index in tqdm(range(len(source)), desc=split, unit="expression", disable=None):
        record = source[index]
        yield record["tokens"][0], record["label"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m polaformer_jax.analysis.first_operator", description=__doc__.split(":")[0] + "."
    )
    parser.add_argument("--data-dir", required=True, help="that holds the prepared lra_listops")
    parser.add_argument("--task", choices=("listops", "listops_short"), default="listops", help="[listops]")
    args = parser.parse_args(argv)
    try:
        rows = [
            [
                split,
                f"{len(right):,}",
                f"{100 * right.mean():.2f}",
                f"{100 * math.sqrt(right.mean() * (1 - right.mean()) / len(right)):.2f}",
            ]
            for split, right in right_answers(args.data_dir, args.task).items()
        ]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    print(tables.columns(["split", "expressions", "accuracy %", "standard error"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
