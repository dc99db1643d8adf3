"""Uploads a model to the Hugging Face Hub, with class names, preprocessing and a model card.

    polaformer push user/name --workdir runs/digits --license mit         # of the best checkpoint, with its eval.json
    polaformer push user/name --workdir runs/digits --dry-run folder      # writes the files to a folder only
    polaformer push user/name --source mine.safetensors --evaluation eval.json

pf.create_model("hf://user/name") gives the model back. Log in before by `hf auth login`, or set HF_TOKEN. The accuracy
in the model card is that of WORKDIR/eval.json, which `polaformer eval` writes, or of the file that --evaluation names.
"""

import json
from collections.abc import Sequence

from polaformer_jax.cli import command, source
from polaformer_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("push", __doc__)
    parser.add_argument("repo", metavar="USER/NAME", help="repository; created if there is none")
    source.add_arguments(parser)
    parser.add_argument("--evaluation", metavar="FILE", help="result of `polaformer eval` [WORKDIR/eval.json]")
    parser.add_argument("--license", metavar="ID", help="of the weights, such as mit [not stated]")
    parser.add_argument(
        "--official-layout", action="store_true", help="also upload the weights as the official PyTorch code takes them"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to [the main branch]")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--dry-run", metavar="DIR", help="write the files to this folder, and upload nothing")
    args = parser.parse_intermixed_args(argv)
    return command.run(lambda: _push(args), options={"repo": "USER/NAME"})


def _push(args) -> None:
    source.check(args)
    import jax

    from polaformer_jax.export import push_to_hub
    from polaformer_jax.training import progress
    from polaformer_jax.weights import hub

    progress.set_up_logging()
    # Files only: a running training may hold the accelerator.
    jax.config.update("jax_platforms", "cpu")
    hub.checked_repo(args.repo)
    hub.library()
    evaluation = _evaluation(args)
    model = source.load(args)
    if args.workdir is not None and args.evaluation is None and evaluation is not None:
        _check_belongs(evaluation, model.info.facts, args)
    address = push_to_hub(
        model,
        args.repo,
        evaluation=evaluation,
        license=args.license,
        official_layout=args.official_layout,
        private=args.private,
        revision=args.revision,
        message=args.message,
        dry_run=args.dry_run,
    )
    print(address)


def _evaluation(args) -> dict | None:
    """The result of an evaluation: of the file that is named, or of the run if it has one."""
    from polaformer_jax.files import paths
    from polaformer_jax.training.progress import log

    if args.evaluation is not None:
        path = paths.given(args.evaluation, "evaluation")
    elif args.workdir is not None:
        path = paths.given(args.workdir, "workdir") / "eval.json"
        if not path.exists():
            log.warning("the model card will have no accuracy: there is no %s; `polaformer eval` writes it", path)
            return None
    else:
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the result of an evaluation: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected the result of `polaformer eval`")
    return content


def _check_belongs(evaluation: dict, facts: dict, args) -> None:
    """Raises a UserError if the run's eval.json is of other weights than those that are pushed."""
    names = ("step", "kind")
    if any(evaluation.get(name) != facts[name] for name in names):
        theirs, ours = (" ".join(f"{name} {where.get(name)}" for name in names) for where in (evaluation, facts))
        raise UserError(
            f"{args.workdir}/eval.json is of other weights ({theirs}) than those to push ({ours}): evaluate these, by"
            f" polaformer eval --workdir {args.workdir} --checkpoint {facts['step']} --weights {facts['kind']}"
        )
