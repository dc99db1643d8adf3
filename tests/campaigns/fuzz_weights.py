"""The long run of `tests.fuzzing`: `python -m tests.campaigns.fuzz_weights --files 10000 --seed 0`.

Every spoilt file of weights has to give correct weights or the clear error. Prints a table by kind of mutation, and
ends with status 1 if a file crashed the reader, made it hang or take much memory, had something executed, or gave other
weights. Such files are kept (`--keep`), and are rebuilt from seed and number alone.
"""

import collections
import resource
import sys
import tempfile
from pathlib import Path

from absl import app, flags
from tqdm import tqdm

from polaformer_jax.weights import read_file
from tests.support import fuzzing
from tests.support.mutations import MUTATIONS, mutant

_FILES = flags.DEFINE_integer("files", 10_000, "Number of files.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Each seed gives other files.")
_FIRST = flags.DEFINE_integer("first", 0, "Number of the first file.", lower_bound=0)
_SUFFIX = flags.DEFINE_enum("suffix", None, [".pth", ".safetensors"], "Take files of this kind alone.")
_KEEP = flags.DEFINE_string("keep", None, "Folder for the files that failed.")

_MEMORY = 1 << 30  # bytes of address space that reading may take: a hundred thousand times the file


def main(_) -> None:
    bases = [base for base in fuzzing.bases() if _SUFFIX.value in (None, base.suffix)]
    outcomes, failures = collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as folder:
        originals = {base.name: _read_sound(base, Path(folder)) for base in bases}
        _limit_memory()
        for index in tqdm(range(_FIRST.value, _FIRST.value + _FILES.value), unit="file"):
            spoilt = mutant(bases, _SEED.value, index, str(Path(folder) / "canary"))
            path = Path(folder) / f"a{spoilt.base.suffix}"
            try:
                outcome = fuzzing.judge(spoilt, path, read_file, originals[spoilt.base.name])
            except fuzzing.Failure as failure:
                outcome = "failed"
                failures.append(f"file {index} ({spoilt.kind}, from {spoilt.base.name}): {failure}")
                _keep(index, spoilt)
            outcomes[spoilt.kind][outcome] += 1
    _print_table(outcomes)
    for failure in failures[:50]:
        print(failure)
    sys.exit(1 if failures else 0)


def _read_sound(base, folder: Path):
    path = folder / f"{base.name}{base.suffix}"
    path.write_bytes(base.content)
    return read_file(path)


def _limit_memory() -> None:
    """Beyond what the process has mapped already; whoever asks for more gets a MemoryError, which is a failure."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _keep(index: int, spoilt) -> None:
    if _KEEP.value:
        folder = Path(_KEEP.value)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{_SEED.value}_{index}{spoilt.base.suffix}").write_bytes(spoilt.content)


def _print_table(outcomes) -> None:
    columns = ("error", "correct", "failed")
    print(f"{'mutation':34}{'files':>9}" + "".join(f"{column:>9}" for column in columns))
    for kind in [kind for kind in MUTATIONS if kind in outcomes]:
        counts = outcomes[kind]
        print(f"{kind:34}{counts.total():>9}" + "".join(f"{counts[column]:>9}" for column in columns))
    total = sum(outcomes.values(), collections.Counter())
    print(f"{'all':34}{total.total():>9}" + "".join(f"{total[column]:>9}" for column in columns))


if __name__ == "__main__":
    app.run(main)
