"""Collects results on the Long Range Arena: a row for each run in a CSV file, and the documentation's table of them.

polaformer lra-table add runs/listops_alpha3       # a finished training's result as a row
polaformer lra-table page                          # the table in docs/long_range_arena.md, written again
polaformer lra-table                               # only printed
"""

import argparse
from collections.abc import Sequence

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("lra-table", __doc__)
    parser.add_argument("--csv", metavar="FILE", default="docs/results/lra.csv", help="results [docs/results/lra.csv]")
    commands = parser.add_subparsers(dest="command", parser_class=argparse.ArgumentParser)
    add = commands.add_parser("add", help="add the results of finished trainings")
    add.add_argument("workdir", nargs="+", help="work directory of a training")
    page = commands.add_parser("page", help="write the table into a page of the documentation")
    page.add_argument("--file", default="docs/long_range_arena.md", help="[docs/long_range_arena.md]")
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args), options={"workdir": "WORKDIR"})


def _main(args) -> None:
    from polaformer_jax.analysis import lra_results
    from polaformer_jax.files import atomic, paths

    try:
        if args.command == "add":
            for workdir in args.workdir:
                row = lra_results.row_of(workdir)
                state = "added" if lra_results.append(args.csv, row) else "is there already"
                print(f"{workdir}: {state}: {row}")
        elif args.command == "page":
            path = paths.given(args.file, "file")
            atomic.write(path, lra_results.with_table(path.read_text(), lra_results.read(args.csv)))
        else:
            print(lra_results.table(lra_results.read(args.csv)))
    except OSError as error:
        raise UserError(str(error)) from error
