"""Recipes: Python files whose `get_config(arg)` returns a config, found by name or by path.

The packaged recipes are the files of the folder `configs`: in a checkout next to the package, in a wheel inside it.
"""

import ast
import contextlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_collections

import polaformer_jax
from polaformer_jax.errors import UserError


def packaged() -> dict[str, Path]:
    """The packaged recipes by name."""
    package = Path(polaformer_jax.__file__).parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if (f / "digits.py").is_file()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def find(text: str) -> tuple[Path, str | None]:
    """The file of a recipe, and its argument.

    Args:
        text: `NAME` or `PATH.py`, which may be followed by a colon and an argument: `pola_swin:t`,
            `configs/digits.py:pvt,epochs=3`.

    Raises:
        UserError: there is no such file or packaged recipe.
    """
    place, colon, arg = text.partition(":")
    known = packaged()
    path = known.get(place) or Path(os.path.expanduser(place))
    if not path.is_file():
        found = "a folder" if place and path.is_dir() else "no such file"
        raise UserError(
            f"config {place!r}: {found}; expected the path of a Python file, or a packaged recipe: {', '.join(known)}"
        )
    return path, arg if colon else None


def load(text: str) -> ml_collections.ConfigDict:
    """The config of a recipe, see `find`.

    Raises:
        UserError: there is no such recipe, it fails, it has no `get_config`, this does not accept its argument, or
            returns no config.
    """
    path, arg = find(text)
    spec = importlib.util.spec_from_file_location(f"polaformer_recipe_{path.stem}", path)
    if spec is None:
        raise UserError(f"config {str(path)!r}: expected a Python file, with the suffix .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    with _failing(spec.origin):
        spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise UserError(f"config {str(path)!r} is not a recipe: it has no get_config")
    if arg is not None and not inspect.signature(get_config).parameters:
        raise UserError(f"config {str(path)!r} takes no argument, found {arg!r}")
    with _failing(spec.origin):
        config = get_config() if arg is None else get_config(arg)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"config {str(path)!r}: get_config returns a {type(config).__name__}, expected a ConfigDict")
    return config


@contextlib.contextmanager
def _failing(path: str) -> Iterator[None]:
    """Runs the code of a recipe, a file, within the context. Its errors become one that names the line."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "configs":
            raise UserError(f"config {path!r} imports {error.name!r}, which is not installed") from error
        raise UserError(
            f"config {path!r} imports {error.name!r}; defaults() and use_official_augmentation() are in"
            " polaformer_jax.config, parse_arg() and load() in polaformer_jax.training.recipes"
        ) from error
    except Exception as error:
        if isinstance(error, SyntaxError) and error.filename == path:
            line, said = error.lineno, error.msg
        else:
            steps = traceback.extract_tb(error.__traceback__)
            line = next((step.lineno for step in reversed(steps) if step.filename == path), None)
            said = error
            while isinstance(said, BaseException) and len(said.args) == 1:  # the text of a KeyError is in quotes
                said = said.args[0]
        place = f"config {path!r}" if line is None else f"config {path!r}, line {line}"
        # ml_collections lists the whole config before it names the field that may be meant.
        said, _, rest = str(said).partition("Other fields present:")
        said += "".join(re.findall("Did you mean .*", rest)[-1:])
        raise UserError(f"{place}: {type(error).__name__}: {' '.join(said.split())}") from error


def parse_arg(
    arg: str | None,
    *,
    models: Sequence[str],
    first: str = "model",
    only: Mapping[str, tuple[str, Sequence]] | None = None,
    **options,
) -> ml_collections.ConfigDict:
    """Parses what follows the colon of `RECIPE:MODEL,key=value,...`.

    Args:
        arg: the text, or None.
        models: valid values of the optional first item; the first of them is the default.
        first: what the first item is, in messages and in what is returned.
        only: options that have a meaning with some values of another one only: its name and these values. With other
            values they are None in what is returned.
        options: the other options and their defaults. A value that is given is converted to its default's type.

    Returns:
        A ConfigDict with `model`, or what `first` says, and every option.

    Raises:
        UserError: an unknown model or option, a value of another type, or an option that means nothing with the others.
    """
    given = {}
    parsed = ml_collections.ConfigDict({first: models[0], **options})
    items = [item.strip() for item in (arg or "").split(",") if item.strip()]
    if items and "=" not in items[0]:
        parsed[first] = items.pop(0)
    if parsed[first] not in models:
        raise UserError(f"this config has no {first} {parsed[first]!r}; it has {', '.join(models)}")
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or key not in options:
            known = ", ".join(f"{option}=" for option in options) or "none"
            raise UserError(f"unknown config option {item!r}; the options are: {known}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        wanted = type(options[key])
        value = float(value) if wanted is float and type(value) is int else value
        if type(value) is not wanted:
            raise UserError(f"config option {key}={text} is not of type {wanted.__name__}")
        parsed[key] = value
        given[key] = item
    for key, (other, values) in (only or {}).items():
        if parsed[other] in values:
            continue
        if key in given:
            raise UserError(
                f"config option {given[key]} goes with {other} {' or '.join(map(str, values))}, found {parsed[other]}"
            )
        parsed[key] = None
    return parsed
