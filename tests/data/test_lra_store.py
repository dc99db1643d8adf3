"""The prepared Long Range Arena on disk: read back, whole or not at all, the same from any number of processes."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from polaformer_jax.cli import prepare as prepare_command
from polaformer_jax.config import SEQUENCE_TASKS
from polaformer_jax.data.lra import generated, listops, open_source, store
from polaformer_jax.data.lra.facts import TASKS
from polaformer_jax.data.lra.pathfinder_pictures import make_examples
from polaformer_jax.data.records import Source
from polaformer_jax.errors import UserError

EXAMPLES = 1200


def run(*arguments):
    return prepare_command.main([str(argument) for argument in arguments])


def open_split(data_dir, task="listops", tokenisation=None, split="train"):
    tokenisation = tokenisation or SEQUENCE_TASKS[task][0]
    return open_source(SimpleNamespace(data_dir=str(data_dir)), task, tokenisation, split)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Small sets of ListOps and Pathfinder, made in this process."""
    directory = tmp_path_factory.mktemp("lra")
    assert run("lra_listops", "--data-dir", directory, "--num-examples", EXAMPLES, "--processes", 1) == 0
    assert run("lra_pathfinder", "--data-dir", directory, "--num-examples", 510, "--processes", 1) == 0
    return directory


@pytest.fixture
def copied(data_dir, tmp_path):
    """A copy of the small ListOps to be damaged."""
    shutil.copytree(data_dir / "lra_listops", tmp_path / "lra_listops")
    return tmp_path


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    ("name", "examples", "processes"),
    [("lra_listops", EXAMPLES, 2), ("lra_listops", EXAMPLES, 4), ("lra_pathfinder", 510, 2)],
)
def test_the_files_are_the_same_whatever_the_number_of_processes(data_dir, tmp_path, name, examples, processes):
    assert run(name, "--data-dir", tmp_path, "--num-examples", examples, "--processes", processes) == 0
    again = store.directory_of(name, tmp_path)
    assert digests(again) == digests(store.directory_of(name, data_dir))
    assert len(digests(again)) == 7


def test_another_seed_gives_other_examples(data_dir, tmp_path):
    assert run("lra_listops", "--data-dir", tmp_path, "--num-examples", 100, "--processes", 1, "--seed", 1) == 0
    first, other = open_split(data_dir)[0]["tokens"], open_split(tmp_path)[0]["tokens"]
    assert not np.array_equal(first, other)


def test_short_listops_is_a_data_set_of_its_own(tmp_path):
    assert run("lra_listops_short", "--data-dir", tmp_path, "--num-examples", 100, "--processes", 1) == 0
    source = open_split(tmp_path, "listops_short", "no_brackets")
    assert len(source) == 96 and source.max_length == 256 and max(source.lengths) < 256
    with pytest.raises(UserError, match="'lra_listops' is not prepared"):
        open_split(tmp_path)


def test_listops_is_read_in_both_tokenisations(data_dir):
    for split, count in (("train", 1152), ("dev", 24), ("test", 24)):
        with_brackets, without = (
            open_split(data_dir, tokenisation=name, split=split) for name in ("brackets", "no_brackets")
        )
        assert isinstance(without, Source) and len(with_brackets) == len(without) == count
        assert (without.num_classes, without.vocabulary, without.max_length) == (10, 32, 2048)
        for i in range(0, count, 7):
            long, short = with_brackets[i], without[i]
            assert long["label"] == short["label"] and long["tokens"].dtype == np.int32
            assert long["tokens"].min() >= 1 and long["tokens"].max() == listops.CLOSE + 1
            assert short["tokens"].tolist() == [token for token in long["tokens"] if token != listops.CLOSE + 1]
            assert (len(long["tokens"]), len(short["tokens"])) == (with_brackets.lengths[i], without.lengths[i])
    assert without.lengths.dtype == np.int32 and not without.lengths.flags.writeable
    assert without.describe(3) == "lra_listops no_brackets/test[3]"


def test_records_are_the_draws_in_order(data_dir):
    kept, source = listops.draw_block(0, 0), open_split(data_dir)
    ends = np.cumsum(kept.lengths)
    for i in (0, 1, 100):
        symbols = kept.symbols[ends[i] - kept.lengths[i] : ends[i]]
        np.testing.assert_array_equal(source[i]["tokens"], symbols.astype(int) + 1)
        assert source[i]["label"] == kept.values[i]


def test_all_expressions_differ_and_the_splits_share_none(data_dir):
    sources = [open_split(data_dir, split=split) for split in ("train", "dev", "test")]
    texts = [source[i]["tokens"].tobytes() for source in sources for i in range(len(source))]
    assert len(texts) == len(set(texts)) == EXAMPLES


def test_pathfinder_is_read_as_it_is_drawn(data_dir):
    made = make_examples(0, np.arange(510))
    sources = [open_split(data_dir, "pathfinder", split=split) for split in ("train", "dev", "test")]
    assert [len(source) for source in sources] == [408, 51, 51]
    number = 0
    for source in sources:
        assert (source.num_classes, source.vocabulary, source.max_length) == (2, 512, 1024)
        assert (source.lengths == 1024).all()
        for record in (source[i] for i in range(len(source))):
            np.testing.assert_array_equal(record["tokens"], made.images[number].reshape(-1).astype(int) + 1)
            assert record["label"] == made.labels[number]
            number += 1
    assert record["tokens"].min() == 1  # black, which is a token and not padding


def test_a_source_travels_by_pickle_without_its_data(data_dir):
    source = open_split(data_dir, tokenisation="no_brackets")
    expected = source[17]
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    np.testing.assert_array_equal(again[17]["tokens"], expected["tokens"])
    np.testing.assert_array_equal(again.lengths, source.lengths)
    assert again.describe(2) == source.describe(2) and again.origin == source.origin


def test_a_set_that_changed_on_the_way_is_told(copied):
    source = open_split(copied)
    sent = pickle.dumps(source)
    shutil.rmtree(copied / "lra_listops")
    run("lra_listops", "--data-dir", copied, "--num-examples", 150, "--processes", 1)
    with pytest.raises(UserError, match="changed since lra_listops brackets/train was opened"):
        pickle.loads(sent)


def test_opening_imports_neither_tensorflow_nor_jax_models(data_dir):
    code = f"""
import sys
from types import SimpleNamespace
from polaformer_jax.data.lra import open_source
source = open_source(SimpleNamespace(data_dir={str(data_dir)!r}), "listops", "brackets", "dev")
source[0]
print([name for name in ("tensorflow", "tensorflow_datasets", "flax", "sklearn") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("index", [-1, 1152])
def test_an_index_outside_is_an_index_error(data_dir, index):
    with pytest.raises(IndexError, match="expected 0 to 1151"):
        open_split(data_dir)[index]


@pytest.mark.parametrize(
    ("task", "tokenisation", "split", "message"),
    [
        ("chess", None, "train", "task.name is 'chess'.*expected one of listops, text"),
        ("listops", None, "train", "task.tokenisation is None, expected 'brackets' or 'no_brackets'"),
        ("listops", "words", "train", "task.tokenisation is 'words'"),
        ("pathfinder", "brackets", "train", "task.tokenisation is 'brackets', expected None for the task 'pathfinder'"),
        ("pathfinder", None, "validation", "split 'validation' of lra_pathfinder, expected one of train, dev, test"),
    ],
)
def test_what_there_is_not_is_told(data_dir, task, tokenisation, split, message):
    with pytest.raises(UserError, match=message):
        open_source(SimpleNamespace(data_dir=data_dir), task, tokenisation, split)


@pytest.mark.parametrize("task", TASKS)
def test_data_that_is_not_prepared_says_what_to_do(tmp_path, task):
    with pytest.raises(UserError, match="is not prepared below") as caught:
        open_split(tmp_path, task)
    assert f"prepare {TASKS[task].data_set} --data-dir {tmp_path}" in str(caught.value)
    with pytest.raises(UserError, match="data.data_dir is None"):
        open_source(SimpleNamespace(data_dir=None), task, SEQUENCE_TASKS[task][0], "train")


# --- damage


def test_files_that_are_cut_short_or_missing_are_refused(copied):
    directory = store.directory_of("lra_listops", copied)
    records = directory / "train.array_record"
    whole = records.read_bytes()
    records.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match="(?s)train.array_record does not have.*Remove this folder and prepare it again"
    ):
        open_split(copied)
    open_split(copied, split="dev")[0]  # the others are whole
    records.unlink()
    with pytest.raises(UserError, match="train cannot be read"):
        open_split(copied)


def test_damaged_lengths_and_a_damaged_index_are_refused(copied):
    directory = store.directory_of("lra_listops", copied)
    lengths = directory / "train.lengths.npy"
    content = bytearray(lengths.read_bytes())
    content[-1] ^= 1
    lengths.write_bytes(content)
    with pytest.raises(UserError, match="train.lengths.npy is damaged"):
        open_split(copied)
    for text in ("", "{}", "[]", json.dumps({"origin": "", "settings": {}, "splits": {"train": {}}})):
        (directory / "index.json").write_text(text)
        with pytest.raises(UserError, match="index.json is damaged"):
            open_split(copied)


def test_damaged_records_are_refused_when_they_are_read(copied):
    records = store.directory_of("lra_listops", copied) / "train.array_record"
    content = bytearray(records.read_bytes())
    middle = len(content) // 2
    content[100_000:middle] = bytes(middle - 100_000)
    records.write_bytes(content)
    source = open_split(copied)
    with pytest.raises(UserError, match="(?s)record .* of train cannot be read.*prepare it again"):
        for i in range(len(source)):
            source[i]


def test_records_of_another_set_are_refused(copied):
    directory = store.directory_of("lra_listops", copied)
    shutil.copy(directory / "dev.array_record", directory / "test.array_record")
    index = json.loads((directory / "index.json").read_text())
    index["splits"]["test"]["bytes"] = (directory / "test.array_record").stat().length
    (directory / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="record 0 of test does not fit its index"):
        open_split(copied, split="test")[0]


# --- preparing


def test_preparing_again_does_nothing_and_other_settings_are_refused(data_dir, capsys):
    before = digests(store.directory_of("lra_listops", data_dir))
    assert run("lra_listops", "--data-dir", data_dir, "--num-examples", EXAMPLES) == 0
    assert "already prepared" in capsys.readouterr().out
    assert run("lra_listops", "--data-dir", data_dir, "--num-examples", EXAMPLES, "--seed", 3) == 1
    assert "is prepared with seed 0, not with seed 3; use another data directory" in capsys.readouterr().err
    assert run("lra_listops", "--data-dir", data_dir) == 1
    assert "is prepared with examples 1200, not with examples 100000" in capsys.readouterr().err
    assert digests(store.directory_of("lra_listops", data_dir)) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lra_listops", "--num-examples", "0"], "--num-examples: 0: expected at least 1"),
        (["lra_listops", "--seed", "-1"], "--seed: -1: expected at least 0"),
        (["lra_listops", "--processes", "0"], "--processes: 0: expected at least 1"),
        (["lra_listops", "--num-examples", "20", "--processes", "1"], "would have no examples in dev, test"),
        (["lra_pathfinder", "--source", "x"], "--source: lra_pathfinder is generated"),
        (["lra_text", "--seed", "3"], "--seed: lra_text is not generated"),
        (["lra_image", "--source", "x"], "--source: lra_image is always made from"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, capsys, arguments, message):
    assert run(*arguments, "--data-dir", tmp_path) == 1
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or "incomplete" in path.name]


def test_an_unknown_name_lists_those_there_are(tmp_path, capsys):
    assert run("lra_chess", "--data-dir", tmp_path) == 1
    assert "lra_pathfinder" in capsys.readouterr().err


def test_a_killed_preparation_leaves_no_data_set_and_is_reported(tmp_path, capsys):
    code = f"""
from polaformer_jax.cli import prepare as prepare_command
prepare_command.main(["lra_listops", "--data-dir", {str(tmp_path)!r}, "--processes", "2"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    folder = tmp_path / "lra_listops"
    deadline = time.monotonic() + 60
    while not list(folder.glob("incomplete.*/*.array_record")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # until the processes that it started have let go of its output
    assert [path.name.startswith("incomplete.") for path in folder.iterdir()] == [True]
    with pytest.raises(UserError, match="is not prepared"):
        open_split(tmp_path)
    assert run("lra_listops", "--data-dir", tmp_path, "--num-examples", 100, "--processes", 1) == 0
    assert "an interrupted preparation left these" in capsys.readouterr().out
    assert len(open_split(tmp_path)) == 96


def test_a_process_that_dies_is_an_error():
    with pytest.raises(UserError, match="was killed from outside"), generated._blocks(os._exit, 3, 2) as blocks:
        next(blocks)


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), store.writing("lra_text", tmp_path, origin="", settings={}) as writer:
        writer.add("train", 1, b"abc", lengths=3)
        raise KeyboardInterrupt
    assert list((tmp_path / "lra_text").iterdir()) == []
