"""A baseline for ListOps that answers an expression by its first operator only.

The answer is the most common value of the training expressions that begin with the same operator: 0 for MIN, 9 for MAX.
"""

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from polaformer_jax.data.lra.facts import SPLITS
from polaformer_jax.data.lra.source import SequenceSource


def correct_answers(data_dir: str, task: str = "listops") -> dict[str, np.ndarray]:
    """For each split, bool (examples,): which expressions are answered correctly by the first operator.

    Args:
        task: `listops` or `listops_short`.

    Raises:
        UserError: ListOps is not prepared in `data_dir`, or is damaged.
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
