"""Collects results of finished trainings in CSV files, and makes the documentation's tables and pictures from them.

    polaformer results add runs/listops_alpha3 runs/fashion    # a finished training's result as a row
    polaformer results page                                    # tables and pictures of docs/, written again
    polaformer results                                         # the tables are printed

Collected are the Long Range Arena (recipe `lra`) and the comparison of attentions on images (recipe `fashion_mnist`).
"""

import argparse
from collections.abc import Sequence

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("results", __doc__)
    parser.add_argument("--dir", metavar="DIR", default="docs/results", help="folder of the CSV files [docs/results]")
    commands = parser.add_subparsers(dest="command", parser_class=argparse.ArgumentParser)
    add = commands.add_parser("add", help="add the results of finished trainings")
    add.add_argument("workdir", nargs="+", help="work directory of a training")
    page = commands.add_parser("page", help="write tables and pictures of the documentation")
    page.add_argument("--docs", metavar="DIR", default="docs", help="folder of the documentation's pages [docs]")
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args), options={"workdir": "WORKDIR"})


def _main(args) -> None:
    from polaformer_jax.analysis.results import page

    try:
        if args.command == "add":
            for workdir in args.workdir:
                path, row, added = page.add(workdir, args.dir)
                print(f"{workdir}: {'added to' if added else 'is already in'} {path}: {row}")
        elif args.command == "page":
            print("written:", *page.write(args.docs, args.dir), sep="\n  ")
        else:
            print("\n\n".join(f"{name}\n\n{table}" for name, table in page.tables(args.dir).items()))
    except OSError as error:
        raise UserError(str(error)) from error
