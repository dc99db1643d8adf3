"""Draws what the augmentation of a config does: a training batch before and after each kind.

polaformer preview --config digits:recipe=full --out preview.png
"""

import sys
from collections.abc import Sequence

from polaformer_jax.cli import command
from polaformer_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("preview", __doc__)
    parser.add_config_argument(help="recipe of the training")
    parser.add_argument("--out", metavar="OUT.png", required=True, help="picture to write")
    return command.run(lambda: _preview(parser, sys.argv[1:] if argv is None else argv))


def _preview(parser: command.Parser, argv: Sequence[str]) -> None:
    args, config = parser.parse_with_config(argv)
    if config is None:
        raise UserError("--config is needed, e.g. --config digits:recipe=full")
    from polaformer_jax.analysis.augmentation import preview
    from polaformer_jax.files import figures
    from polaformer_jax.training import progress

    figures.check_name(args.out, "out", suffixes=(".png",))
    progress.set_up_logging()
    figures.save(preview(config), args.out)
    print(args.out)
