"""What the subcommands share: parsers that take their help from docstrings, configs with overrides, error messages."""

import argparse
import contextlib
import difflib
import faulthandler
import os
import re
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polaformer_jax.errors import Interrupted, NotWrittenError, UserError

if TYPE_CHECKING:
    import ml_collections

_OVERRIDE = re.compile(r"--(no)?config\.")
# Modules of the packages of the extra `train`.
TRAINING_MODULES = {"array_record", "clu", "cv2", "grain", "importlib_resources", "ml_collections", "optax", "orbax"}
TRAINING_MODULES |= {"scipy", "sklearn", "tensorboard", "tensorflow", "tensorflow_datasets"}


class Parser(argparse.ArgumentParser):
    """A parser whose description and epilog are the first paragraph and the rest of a docstring.

    Options are spelt with dashes or underscores, and never abbreviated.

    Args:
        name: of the subcommand.
        doc: the docstring of its module.
    """

    def __init__(self, name: str, doc: str, **options):
        description, _, epilog = doc.partition("\n\n")
        super().__init__(
            prog=f"polaformer {name}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def add_argument(self, *names: str, **options) -> argparse.Action:
        # --data-dir is --data_dir too, as absl spells flags.
        spelt = [n.replace("-", "_").replace("__", "--", 1) for n in names if n.startswith("--") and "-" in n[2:]]
        action = super().add_argument(*names, *spelt, **options)
        action.option_strings = action.option_strings[: len(names)] if names[0].startswith("-") else []
        return action

    def add_config_argument(self, *, help: str) -> None:
        """Adds `--config`; `parse_with_config` returns what it names."""
        self.add_argument("--config", metavar="RECIPE[:ARG]", help=help)
        self.epilog = (
            f"{self.epilog.rstrip()}\n\n"
            "RECIPE is the name of a packaged recipe or the path of a Python file, and ARG its argument, as in\n"
            "pola_swin:t or digits:swin,epochs=5. --config.FIELD=VALUE changes any field of the config, as in\n"
            "--config.optimizer.lr=1e-3; polaformer_jax/config.py describes all of them."
        )

    def parse_with_config(self, argv: Sequence[str]) -> tuple[argparse.Namespace, "ml_collections.ConfigDict | None"]:
        """The options, and the config with its overrides; None where no `--config` is given.

        Raises:
            UserError: there is no such recipe, it refuses its argument, or an override does not fit.
        """
        args, rest = self.parse_known_args(argv)
        unknown = [word for word in rest if word.startswith("-") and not _OVERRIDE.match(word) and not _number(word)]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if args.config is None:
            if rest:
                raise UserError(f"{rest[0]}: give the config whose field it changes by --config")
            return args, None
        from polaformer_jax.training import recipes

        return args, _overridden(recipes.load(args.config), rest)


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _overridden(config: "ml_collections.ConfigDict", words: Sequence[str]) -> "ml_collections.ConfigDict":
    """A config with fields changed as `--config.FIELD=VALUE` says; of several values of a field, the last counts.

    `--config.FIELD=None` sets a field to None if it may be None; config_flags would convert the word to the field's
    type.
    """
    from absl import flags
    from ml_collections import config_flags

    kept, is_none = [], {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not _OVERRIDE.match(word):
            kept.append(word)
            continue
        field = _check_field(config, word)
        if "=" not in word and left[:1] == ["None"]:
            word = f"{word}={left.pop(0)}"
        is_none[field] = word.partition("=")[2] == "None"
        if not is_none[field]:
            kept.append(word)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=kept)
        rest = values(["polaformer", *kept])
    except flags.Error as error:
        raise UserError(f"{error}; see --help") from error
    if len(rest) > 1:
        raise UserError(f"unexpected arguments {' '.join(rest[1:])}; see --help")
    for field in (field for field, none in is_none.items() if none):
        _set_to_none(config, field)
    return config


def _check_field(config: "ml_collections.ConfigDict", word: str) -> str:
    """The field that an override names, which the config must have."""
    field = _OVERRIDE.sub("", word).partition("=")[0]
    if not re.fullmatch(r"\w+(\.\w+)*", field):
        raise UserError(
            f"{word}: expected --config.FIELD=VALUE with a field such as optimizer.lr; tuples are set whole"
        )
    node, names = config, field.split(".")
    for i, name in enumerate(names):
        known = list(node) if hasattr(node, "keys") else []
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {'.'.join([*names[:i], *similar])}? " if similar else ""
            raise UserError(f"{word}: there is no field {field}. {hint}polaformer_jax/config.py describes all fields")
        node = node[name]
    if hasattr(node, "keys"):
        raise UserError(f"{word}: {field} is a section of the config; set its fields: {', '.join(node)}")
    return field


def _set_to_none(config: "ml_collections.ConfigDict", field: str) -> None:
    from polaformer_jax.config import may_be_none

    *parts, name = field.split(".")
    for part in parts:
        config = config[part]
    if not may_be_none(field):
        raise UserError(f"--config.{field}=None: this field must have a value, such as {config[name]!r}")
    config[name] = None


def run(action: Callable[[], int | None], *, options: Mapping[str, str] | None = None) -> int:
    """Runs an action and returns the exit status; errors that the user can fix become one message.

    Any other exception is a bug, and raised. A process that is aborted, as JAX does when it loses another one, shows
    where its threads are. What the encoding of the terminal does not have is printed escaped.

    Args:
        action: returns its exit status, or None for 0.
        options: the option that sets a parameter, where its name is another than the parameter's.
    """
    _open_standard_streams()
    if not faulthandler.is_enabled():
        faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # what a notebook or a test has in its place
            stream.reconfigure(errors="backslashreplace")
    status = _status(action, options or {})
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # as in `polaformer predict ... | head -1`
        _drop_output()
        return status or 1
    except OSError as error:
        return _output_lost(error)
    return status


def _status(action: Callable[[], int | None], options: Mapping[str, str]) -> int:
    """Runs an action; its exit status, or that of the error, which is printed."""
    try:
        return action() or 0
    except UserError as error:
        option = _option(error.argument, options)
        _say(f"error: {option}{error.message}")
        return error.status
    except BrokenPipeError:
        if not _stdout_is_closed():  # another pipe, such as one to a worker process
            raise
        _drop_output()
        return 1
    except Interrupted as stop:
        _say(f"interrupted: {stop}")
        return stop.status
    except ModuleNotFoundError as error:
        if not _belongs_to_training(error.name):
            raise
        _say(
            f"error: this command needs packages that are not installed ({error.name}): pip install"
            ' "polaformer_jax[train]"'
        )
        return 1
    except OSError:
        if (problem := _output_problem()) is None:  # the error is not that of printing
            raise
        return _output_lost(problem)
    except (RuntimeError, AssertionError):  # what JAX raises where it has no device, in its several versions
        if (problem := _device_problem()) is None:
            raise
        _say(f"error: {problem}")
        return 1


def outcome(action: Callable[[], Any]) -> tuple[Any, NotWrittenError | None]:
    """The result of an action, and why it could not be written, to be raised once the result has been printed."""
    try:
        return action(), None
    except NotWrittenError as error:
        return error.result, error


def _open_standard_streams() -> None:
    """Opens those that were closed when the process began, so that no other file gets their numbers and messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.__stderr__ = sys.__stderr__ or sys.stderr


def _say(text: str) -> None:
    """Prints to stderr, if anyone still reads it: the exit status says the rest."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _output_problem() -> OSError | None:
    """Why printing fails: a full disk, a closed terminal. None, and an empty line, if it does not."""
    try:
        print(flush=True)
    except OSError as error:
        return error
    return None


def _output_lost(error: OSError) -> int:
    _drop_output()
    _say(f"error: the output cannot be written: {error}")
    return 1


def _device_problem() -> str | None:
    """Why JAX has no device to compute on, for people; None if it has one."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split()) or "it has no such platform here"
        asked = os.environ.get("JAX_PLATFORMS")
        way_out = f"JAX_PLATFORMS={asked} asks for one: unset it, or set another" if asked else "is its driver there?"
        return f"JAX cannot use a device ({said}); {way_out}"
    return None


def _drop_output() -> None:
    """What is left to print goes nowhere, instead of into an error at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stdout_is_closed() -> bool:
    """Whether stdout is a pipe that nothing reads any more."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)  # errors are always reported
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in pipe.poll(0))


def _option(argument: str | None, options: Mapping[str, str]) -> str:
    if argument is None:
        return ""
    return f"{options.get(argument, '--' + argument.replace('_', '-'))}: "


def _belongs_to_training(module: str | None) -> bool:
    """Whether a module that is missing comes with the extra `train`."""
    return module is not None and module.split(".")[0] in TRAINING_MODULES


def positive_integer(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return int(text)
