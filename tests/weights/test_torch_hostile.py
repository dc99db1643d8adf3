"""Hostile and damaged pickles in files of `torch.save`: nothing is executed, nothing grows, all end in one error."""

import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest

from polaformer_jax.errors import WeightsError
from polaformer_jax.weights import torch_zip
from tests.support.torch_files import Call, Name, View, pack, records, write_pth, write_zip

BASE = np.arange(24, dtype=np.float32)


def read_back(tmp_path, content, **options):
    return torch_zip.read(write_pth(tmp_path / "a.pth", content, **options))


def read_pickle(tmp_path, pickled: bytes, data=None):
    return torch_zip.read(write_zip(tmp_path / "a.pth", pack(pickled, data or {})))


def tensor_pickle(offset=0, size=(2, 3), stride=(3, 1), numel=6, key="0", storage="torch FloatStorage") -> bytes:
    """One tensor, by hand: any Python numbers for offset, size, strides."""
    plain = [pickle.dumps(part, 2)[2:-1] for part in (offset, size, stride, key, numel)]
    module, name = storage.split(" ")
    persistent = b"(X\x07\0\0\0storagec%b\n%b\n%bX\x03\0\0\0cpu%bt" % (
        module.encode(), name.encode(), plain[3], plain[4]
    )  # fmt: skip
    # Memo entries of the parts overwrite each other, and nothing recalls them.
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + b"Q" + b"".join(plain[:3]) + b"\x89)tR."


# --- nothing is executed


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "name",
    "os.system posix.system subprocess.check_call builtins.eval builtins.exec __builtin__.eval builtins.getattr "
    "pickle.loads torch.load torch.jit.load numpy.load runpy._run_code shutil.rmtree operator.attrgetter "
    "functools.partial torch._utils._rebuild_tensor argparse.Namespace collections.OrderedDict.fromkeys "
    "torch.FloatTensor".split(),
)
def test_other_objects_are_refused_by_name(tmp_path, name, protocol):
    canary = tmp_path / "canary"
    call = Call(Name(*name.rsplit(".", 1)), (f"touch {canary}",))
    with pytest.raises(WeightsError, match=f"Python object {name}; .* nothing was executed.* save the state_dict"):
        read_back(tmp_path, {"model": {"a": BASE}, "args": call}, protocol=protocol)
    assert not canary.exists()


def test_the_canary_would_sing(tmp_path):
    """The hostile pickles of these tests are real ones."""
    canary = tmp_path / "canary"
    pickle.loads(records(Call(Name("os", "system"), (f"touch {canary}",)))["data.pkl"])
    assert canary.exists()


@pytest.mark.parametrize(
    "pickled, found",
    [
        (b"\x80\x02(X\x02\0\0\0idios\nsystem\n.", r"opcode INST for 'os system'"),
        (b"\x80\x02(cos\nsystem\nX\x02\0\0\0ido.", "object os.system"),
        (b"\x80\x02(ccollections\nOrderedDict\no.", "opcode OBJ"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02P0\n.", "opcode PERSID"),
        (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX"),
        (b"\x80\x02S'a'\n.", "opcode STRING"),
    ],
)
def test_other_opcodes_are_refused_by_name(tmp_path, pickled, found):
    with pytest.raises(WeightsError, match=f"{found}.*refused"):
        read_pickle(tmp_path, pickled)


@pytest.mark.parametrize(
    "call",
    [
        Call(Name("collections", "OrderedDict"), ([("a", 1)],)),
        Call(Name("torch", "FloatStorage"), (3,)),
        Call(Name("torch", "Size"), ("12",)),
        Call(Name("torch._utils", "_rebuild_tensor_v2"), (1, 2, 3)),
        Call(Name("torch._utils", "_rebuild_parameter"), ("a", True, {})),
        Call(Name("yacs.config", "CfgNode"), ({"a": 1},)),
        Call(Name("builtins", "set"), ("ab",)),
    ],
    ids=lambda call: call.function.name,
)
def test_listed_names_take_only_what_pytorch_gives_them(tmp_path, call):
    with pytest.raises(WeightsError, match="calls .* with arguments that PyTorch does not give it"):
        read_back(tmp_path, call)


def test_tensors_to_be_conjugated_are_refused(tmp_path):
    pickled = tensor_pickle().replace(b"\x89)tR.", b"\x89)}X\x04\0\0\0conj\x88stR.")
    with pytest.raises(WeightsError, match="conjugate.*resolve_conj"):
        read_pickle(tmp_path, pickled, {"data/0": bytes(24)})


# --- lying tensors

HUGE = 1 << 62


@pytest.mark.parametrize(
    "arguments, found",
    [
        ({"numel": 7}, "has 24 bytes, expected 7 elements of float32"),
        ({"numel": HUGE}, "has 24 bytes, expected 4,611,686,018,427,387,904 elements"),
        ({"storage": "torch DoubleStorage"}, "expected 6 elements of float64"),
        ({"numel": True}, "not the storage of a tensor"),
        ({"numel": -6}, "not the storage of a tensor"),
        ({"storage": "torch uint16"}, "not the storage of a tensor"),
        ({"key": "1"}, "the storage '1' is missing"),
        ({"key": "../data.pkl"}, "is missing"),
        ({"offset": 1}, r"shape \(2, 3\), strides \(3, 1\) and offset 1 goes beyond its storage of 6"),
        ({"size": (3, 3)}, "goes beyond its storage"),
        ({"stride": (4, 1)}, "goes beyond its storage"),
        ({"size": (HUGE, HUGE)}, "goes beyond its storage"),
        ({"size": (HUGE, HUGE), "stride": (0, 0)}, "bytes more than its storages"),
        ({"size": (0, HUGE * 2), "stride": (1, 1)}, "cannot be"),
        ({"size": (2, 3, 1)}, "do not match"),
        ({"size": (-2, 3)}, "not integers from 0"),
        ({"size": (True, 3)}, "not integers from 0"),
        ({"size": (2.0, 3)}, "not integers from 0"),
        ({"stride": (-3, 1), "offset": 3}, "not integers from 0"),
        ({"offset": -1}, "not integers from 0"),
        ({"offset": None}, "not integers from 0"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "not integers from 0"),
        ({"size": [2, 3]}, "not integers from 0"),
    ],
    ids=str,
)
def test_lying_tensors(tmp_path, arguments, found):
    with pytest.raises(WeightsError, match=found):
        read_pickle(tmp_path, tensor_pickle(**arguments), {"data/0": bytes(24)})


def test_the_hand_made_tensor_is_sound(tmp_path):
    assert read_pickle(tmp_path, tensor_pickle(), {"data/0": BASE[:6].tobytes()}).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_bools_are_0_or_1(tmp_path):
    with pytest.raises(WeightsError, match="the storage '0' of bools has other values than 0 and 1"):
        read_pickle(tmp_path, tensor_pickle(storage="torch BoolStorage"), {"data/0": b"\0\1\0\1\2\0"})


def test_one_storage_of_two_types(tmp_path):
    pickled = tensor_pickle()[:-1] + tensor_pickle(storage="torch IntStorage")[2:-1] + b"\x86."
    with pytest.raises(WeightsError, match="the storage '0' is described in two ways"):
        read_pickle(tmp_path, pickled, {"data/0": bytes(24)})


def test_a_claimed_terabyte_takes_no_memory(tmp_path):
    write_pth(tmp_path / "a.pth", {"a": View(BASE, 0, (1 << 38,), (0,))})
    tracemalloc.start()
    with pytest.raises(WeightsError, match="bytes more than its storages"):
        torch_zip.read(tmp_path / "a.pth")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_many_expanded_tensors_count_together(tmp_path):
    views = [View(BASE, 0, (1 << 20,), (0,)) for _ in range(20)]
    assert len(read_back(tmp_path, views[:10])) == 10
    with pytest.raises(WeightsError, match="bytes more than its storages"):
        read_back(tmp_path, views)


# --- damaged and endless pickles


@pytest.mark.parametrize(
    "pickled, found",
    [
        (b"", "cannot be decoded"),
        (b"\x80\x02", "cannot be decoded"),
        (b"}.", "where PROTO is expected first"),
        (b"\x80\x02\x80\x02.", "never again"),
        (b"\x80\x09}.", "is of protocol 9, expected 2 to 5"),
        (b"\x80\x02.", "needs an object where there is none"),
        (b"\x80\x02}}.", "leaves objects unused"),
        (b"\x80\x02(}.", "leaves objects unused"),
        (b"\x80\x02}.}", "1 bytes before the end"),
        (b"\x80\x02h\x05.", "recalls the object 5"),
        (b"\x80\x02t.", "a mark that it has not set"),
        (b"\x80\x02](K\x01u.", "without a value"),
        (b"\x80\x02](K\x01K\x02u.", "has a list where a dict is expected"),
        (b"\x80\x02}K\x01a.", "has a dict where a list is expected"),
        (b"\x80\x02}]K\x01s.", "has a list as the key"),
        (b"\x80\x02}K\x01K\x02\x86K\x01s.", "has a tuple as the key"),
        (b"\x80\x02]}b.", "has a list where a dict is expected"),
        (b"\x80\x02]Q.", "not the storage of a tensor"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "creates a collections.OrderedDict"),
        (b"\x80\x02X\x02\0\0\0\xff\xfe.", "cannot be decoded"),
        (b"\x80\x02X\x03\0\0\0\xed\xa0\x80.", "cannot be decoded"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "cannot be decoded"),
        (b"\x80\x02\x8a\x10" + b"\x7f" * 16 + b".", "an integer of 127 bits"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "cannot be decoded"),
        (b"\x80\x02\xff.", "cannot be decoded"),
        (b"\x80\x04K\x01K\x02\x93.", "has a int where a str is expected"),
    ],
)
def test_damaged_pickles(tmp_path, pickled, found):
    with pytest.raises(WeightsError, match=found):
        read_pickle(tmp_path, pickled)


def test_a_memo_of_any_index_allocates_nothing(tmp_path):
    pickled = b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", 0xFFFFFFFF - i) for i in range(100)) + b"."
    tracemalloc.start()
    assert read_pickle(tmp_path, pickled) == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def nested_tuples() -> bytes:
    """Thirty doublings: a billion elements to whoever walks or hashes them."""
    return b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 30 + b"K\x01s."


def many_sets() -> bytes:
    """One list of 1,000 items, made a set 10,000 times."""
    items = b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(1000)) + b"e\x85"
    return b"\x80\x02c__builtin__\nset\nq\x01" + items + b"q\x00]" + b"h\x01h\x00Ra" * 10_000 + b"\x87."


def many_texts() -> bytes:
    """One text of 1 MB, made bytes 1,000 times."""
    text = b"(X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"X\x06\0\0\0latin1tq\x00"
    return b"\x80\x02c_codecs\nencode\nq\x01" + text + b"]" + b"h\x01h\x00Ra" * 1000 + b"\x87."


def many_axes() -> bytes:
    """One tensor of 64 axes, made 100,000 times."""
    one = tensor_pickle(size=(1,) * 64, stride=(1,) * 64)
    function, arguments = one[2 : one.index(b"(")], one[one.index(b"(") : -2]
    return b"\x80\x02" + function + b"q\x01" + arguments + b"r\0\1\0\0]" + b"h\x01j\0\1\0\0Ra" * 100_000 + b"\x87."


@pytest.mark.parametrize(
    "pickled",
    [nested_tuples(), many_sets(), many_texts(), many_axes()],
    ids="tuples sets texts axes".split(),
)
def test_pickles_cannot_multiply_themselves(tmp_path, pickled):
    start = time.monotonic()
    with pytest.raises(WeightsError, match="steps|as the key"):
        read_pickle(tmp_path, pickled, {"data/0": bytes(24)})
    assert time.monotonic() - start < 5


def test_nesting_needs_no_recursion(tmp_path):
    found, depth = read_pickle(tmp_path, b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."), 0
    while found:
        found, depth = found[0], depth + 1
    assert depth == 49_999


def test_too_large_a_pickle(tmp_path):
    with pytest.raises(WeightsError, match="its pickle has 16,777,217 bytes, expected at most 16,777,216"):
        read_pickle(tmp_path, bytes(2**24 + 1))
    with pytest.raises(WeightsError, match="more than 1,000,000 steps"):
        read_pickle(tmp_path, b"\x80\x02]" + b"Na" * 500_001 + b".")


def test_containers_that_hold_themselves(tmp_path):
    found = read_pickle(tmp_path, b"\x80\x02}q\x00X\x01\0\0\0ah\x00s.")
    assert found["a"] is found
