"""Draws Pathfinder examples with their labels, to be judged by eye.

    polaformer lra-sheet --output sheet.png

Each picture is above what was drawn: the two target curves in colour, their discs, and the distractors in grey.
"""

from collections.abc import Sequence

from polaformer_jax.cli import command


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("lra-sheet", __doc__)
    parser.add_argument("--output", metavar="OUT.png", required=True, help="picture to write")
    parser.add_argument("--examples", type=command.positive_integer, default=24, help="how many [24]")
    parser.add_argument("--seed", type=int, default=0, help="as for prepare lra_pathfinder [0]")
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args))


def _main(args) -> None:
    import numpy as np

    from polaformer_jax.analysis.pathfinder_sheet import draw_sheet
    from polaformer_jax.data.lra.pathfinder_pictures import make_examples
    from polaformer_jax.files import figures

    figures.check_name(args.output, "output", suffixes=(".png",))
    figures.save(draw_sheet(make_examples(args.seed, np.arange(args.examples))), args.output)
    print(args.output)
