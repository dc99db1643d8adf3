"""Spoilt files of weights give correct weights or the error; `tests/campaigns/fuzz_weights.py` tries many more."""

import collections
import resource

import pytest

from polaformer_jax.weights import read_file
from tests.support import fuzzing
from tests.support.mutations import MUTATIONS, mutant

EACH = 20  # files of each kind
BASES = fuzzing.bases()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """What the sound files give."""
    found = {}
    for base in BASES:
        path = tmp_path_factory.mktemp("sound") / f"a{base.suffix}"
        path.write_bytes(base.content)
        found[base.name] = read_file(path)
    return found


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_sound_files_read_as_independently(base, originals, tmp_path):
    path = tmp_path / f"a{base.suffix}"
    path.write_bytes(base.content)
    assert fuzzing.same(originals[base.name], fuzzing.independent(path))


@pytest.mark.parametrize("number, kind", list(enumerate(MUTATIONS)))
def test_spoilt_files(number, kind, originals, tmp_path):
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = collections.Counter()
    for index in range(number, number + EACH * len(MUTATIONS), len(MUTATIONS)):
        spoilt = mutant(BASES, 0, index, str(tmp_path / "canary"))
        assert spoilt.kind == kind
        path = tmp_path / f"a{spoilt.base.suffix}"
        outcomes[fuzzing.judge(spoilt, path, read_file, originals[spoilt.base.name])] += 1
    assert outcomes["error"] + outcomes["correct"] == EACH
    assert outcomes["error"] >= 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000, "KiB"
