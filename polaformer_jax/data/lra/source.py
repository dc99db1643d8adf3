"""The prepared data of the Long Range Arena as random-access sources (see `records.Source`)."""

import hashlib
import io
import json

import numpy as np
from etils import epath

from polaformer_jax.config import SEQUENCE_TASKS
from polaformer_jax.data.lra import store
from polaformer_jax.data.lra.facts import SPLITS, facts_of, missing_message
from polaformer_jax.data.lra.listops import without_brackets
from polaformer_jax.data.records import Record
from polaformer_jax.errors import UserError


class SequenceSource:
    """One split of one task. `source[i]` is `{"tokens": int32 (n,), "label": int}`; for retrieval `tokens` is a pair.

    Cheap to send to a worker process: only the location of the files is pickled, and they are opened there. Record
    files are opened when the first record is read.

    Args:
        task: `listops`, `listops_short`, `text`, `retrieval`, `pathfinder` or `image_lra`.
        data_dir: the directory that holds all prepared data sets.
        tokenisation: for ListOps `brackets` or `no_brackets`; for the others None.
        split: `train`, `dev` or `test`.

    Attributes:
        name: for messages, e.g. `lra_listops no_brackets/dev`.
        origin: human-readable description of where the data comes from; distinguishes the halves and splits of the
            reviews.
        digest: of what the data was made with, and of the split's sizes and lengths.
        num_classes, class_names: labels are in `[0, num_classes)`.
        vocabulary: the number of token ids. Id 0 is padding and never occurs in the data.
        max_length: no sequence is longer.
        lengths: int32 (len,), for retrieval (len, 2); read-only.

    Raises:
        UserError: unknown task, tokenisation or split; not prepared (the message says how); damaged files.
    """

    def __init__(self, task: str, *, data_dir: epath.PathLike, tokenisation: str | None, split: str):
        facts = facts_of(task)
        if tokenisation not in SEQUENCE_TASKS[task]:
            expected = " or ".join(map(repr, SEQUENCE_TASKS[task]))
            raise UserError(f"task.tokenisation is {tokenisation!r}, expected {expected} for the task {task!r}")
        if split not in SPLITS:
            raise UserError(f"split {split!r} of {facts.data_set}, expected one of {', '.join(SPLITS)}")
        if not data_dir:
            raise UserError(f"data.data_dir is {data_dir!r}, expected the directory that holds {facts.data_set}")
        self._task, self._tokenisation, self._split = task, tokenisation, split
        self._data_dir = str(data_dir)
        self.name = f"{facts.data_set} {tokenisation}/{split}" if tokenisation else f"{facts.data_set}/{split}"
        self._open()

    def _open(self):
        facts = facts_of(self._task)
        self.class_names, self.num_classes = facts.class_names, len(facts.class_names)
        self.vocabulary, self.max_length = facts.vocabulary, facts.max_length
        self._texts = facts.texts
        found = store.find(facts.data_set, self._data_dir)
        if found is None:
            message = missing_message(self._task, self._data_dir)
            raise UserError(f"data set {facts.data_set!r} is not prepared below {self._data_dir}. {message}")
        self._directory, index = found
        self.origin = index.origin
        described = [facts.data_set, self._tokenisation, index.settings, index.splits.get(self._split)]
        self.digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self._records_path = self._directory / f"{self._split}.array_record"
        self._reader = None
        try:
            self._length = index.splits[self._split]["examples"]
            self._lengths_digest = index.splits[self._split]["lengths_sha256"]
            size = index.splits[self._split]["bytes"]
            if self._records_path.stat().length != size:
                raise UserError(self._damaged(f"{self._records_path.name} does not have its {size} bytes"))
            content = (self._directory / f"{self._split}.lengths.npy").read_bytes()
        except (OSError, KeyError, TypeError) as error:
            raise UserError(self._damaged(f"{self._split} cannot be read ({error})")) from error
        if hashlib.sha256(content).hexdigest() != self._lengths_digest:
            raise UserError(self._damaged(f"{self._split}.lengths.npy is damaged"))
        lengths = np.load(io.BytesIO(content))
        if self._tokenisation:
            lengths = np.ascontiguousarray(lengths[:, SEQUENCE_TASKS[self._task].index(self._tokenisation)])
        lengths.flags.writeable = False
        self.lengths = lengths

    def __getstate__(self):
        names = ("name", "_task", "_tokenisation", "_split", "_data_dir", "_lengths_digest")
        return {key: self.__dict__[key] for key in names}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()
        if self._lengths_digest != state["_lengths_digest"]:
            raise UserError(f"{self._directory} changed since {self.name} was opened: start again")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """Example `index`.

        Raises:
            IndexError: not in `[0, len)`.
            UserError: the record is damaged.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"{self.name} has no record {index}, expected 0 to {self._length - 1}")
        label, texts = store.decode(self._read(index), self._texts)
        if self._tokenisation == "no_brackets":
            texts = (without_brackets(texts[0]),)
        tokens = tuple(text.astype(np.int32) + 1 for text in texts)  # id 0 is padding
        expected = self.lengths[index].reshape(-1).tolist()
        if [len(text) for text in tokens] != expected or label >= self.num_classes:
            raise UserError(self._damaged(f"record {index} of {self._split} does not fit its index"))
        return {"tokens": tokens[0] if self._texts == 1 else tokens, "label": label}

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def _read(self, index: int) -> bytes:
        from array_record.python import array_record_module

        # The library raises RuntimeError for damage of any kind, and reports no records for a file that it cannot
        # parse.
        try:
            if self._reader is None:
                reader = array_record_module.ArrayRecordReader(str(self._records_path), "readahead_buffer_size:0")
                if reader.num_records() != self._length:
                    raise RuntimeError(f"{reader.num_records()} records found, expected {self._length}")
                self._reader = reader
            return self._reader.read([index])[0]
        except (RuntimeError, IndexError, OSError) as error:
            raise UserError(self._damaged(f"record {index} of {self._split} cannot be read ({error})")) from error

    def _damaged(self, found: str) -> str:
        return store.damaged_message(self._directory, found)


def open_source(config_data, task_name: str, tokenisation: str | None, split: str) -> SequenceSource:
    """Opens the data of a task; only reads, and never generates or downloads anything.

    Args:
        config_data: the config's `data` part; its `data_dir` holds the prepared data sets.
        task_name, tokenisation, split: see `SequenceSource`.

    Raises:
        UserError: see `SequenceSource`.
    """
    return SequenceSource(task_name, data_dir=config_data.data_dir, tokenisation=tokenisation, split=split)
