"""Measures how concentrated attention is in trained sequence models, as a table and a picture.

    polaformer lra-entropy runs/listops_alpha3 runs/listops_relu runs/listops_softmax --plot entropy.png

Entropies are those of the attention rows; polarity-aware attention is measured as trained, and with the power p = 1.
"""

from collections.abc import Sequence

from polaformer_jax.cli import command


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("lra-entropy", __doc__)
    parser.add_argument("runs", nargs="+", metavar="WORKDIR", help="work directories of finished trainings")
    parser.add_argument("--examples", type=command.positive_integer, default=64, help="test sequences [64]")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data is now [where the runs' configs say]")
    parser.add_argument("--csv", metavar="FILE", help="file for the table")
    parser.add_argument("--plot", metavar="FILE", help="file for the picture, .png or .svg")
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args), options={"workdir": "WORKDIR"})


def _main(args) -> None:
    from polaformer_jax.analysis import sequence_entropy
    from polaformer_jax.files import figures, tables

    if args.plot is not None:
        figures.check_name(args.plot, "plot")
    tables.check_csv(args.csv)
    runs = sequence_entropy.of_runs(args.runs, examples=args.examples, data_dir=args.data_dir)
    rows = sequence_entropy.records(runs)
    print(tables.columns(list(rows[0]), [list(row.values()) for row in rows], left=3))
    if args.csv is not None:
        tables.write_csv(args.csv, rows)
    if args.plot is not None:
        figures.save(sequence_entropy.draw(runs), args.plot)
