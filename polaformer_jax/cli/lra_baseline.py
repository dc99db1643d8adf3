"""Answers ListOps by only the first operator of an expression, a baseline for trained models.

    polaformer lra-baseline --data-dir data

Each expression is answered by the commonest value of the training expressions that begin with the same operator.
"""

import math
from collections.abc import Sequence

from polaformer_jax.cli import command


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("lra-baseline", __doc__)
    parser.add_argument("--data-dir", metavar="DIR", required=True, help="directory of the prepared lra_listops")
    parser.add_argument("--task", choices=("listops", "listops_short"), default="listops", help="[listops]")
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args))


def _main(args) -> None:
    from polaformer_jax.analysis.first_operator import correct_answers
    from polaformer_jax.files import tables

    rows = []
    for split, correct in correct_answers(args.data_dir, args.task).items():
        share = correct.mean()
        error = math.sqrt(share * (1 - share) / len(correct))
        rows.append([split, f"{len(correct):,}", f"{100 * share:.2f}", f"{100 * error:.2f}"])
    print(tables.columns(["split", "expressions", "accuracy %", "standard error"], rows))
