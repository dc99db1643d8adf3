"""Measures how concentrated attention is in trained models, as a table and a picture.

    polaformer entropy runs/listops_alpha3 runs/listops_relu runs/listops_softmax --plot entropy.png
    polaformer entropy runs/fashion_polarity runs/fashion_softmax --maps maps.png     # images: also where models look

Entropies are those of the attention rows; polarity-aware attention is measured as trained, and with the power p = 1.
"""

from collections.abc import Sequence

from polaformer_jax.cli import command


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("entropy", __doc__)
    parser.add_argument("runs", nargs="+", metavar="WORKDIR", help="work directories of finished trainings")
    parser.add_argument("--examples", type=command.positive_integer, default=64, help="test examples [64]")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data is now [where the runs' configs say]")
    parser.add_argument("--csv", metavar="FILE", help="file for the table")
    parser.add_argument("--plot", metavar="FILE", help="file for the picture, .png or .svg")
    parser.add_argument("--maps", metavar="FILE", help="file for maps of image models on the same images, .png or .svg")
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args), options={"workdir": "WORKDIR"})


def _main(args) -> None:
    from polaformer_jax.analysis import entropy, map_sheet
    from polaformer_jax.analysis.results import entropy as pictures
    from polaformer_jax.analysis.results import rows as results
    from polaformer_jax.files import figures, tables

    for name in ("plot", "maps"):
        if getattr(args, name) is not None:
            figures.check_name(getattr(args, name), name)
    tables.check_csv(args.csv)
    if args.maps is not None:
        map_sheet.check(args.runs)
    rows = entropy.of_runs(args.runs, examples=args.examples, data_dir=args.data_dir)
    print(tables.columns(results.columns(pictures.Row), [results.cells(row) for row in rows], left=2))
    if args.csv is not None:
        results.write(args.csv, rows)
    if args.plot is not None:
        figures.save(pictures.draw(rows), args.plot)
    if args.maps is not None:
        figures.save(map_sheet.draw(args.runs, data_dir=args.data_dir), args.maps)
