"""How entry scripts start and end: flags in, and on an error that the user can put right one message and a status.

Imports nothing heavy: processes that read data import the entry script, and so this file, again.
"""

import os
import re
import sys
from collections.abc import Callable

from absl import app, flags

from polaformer_jax.errors import Interrupted, UserError


def run(main: Callable[[list[str]], None]) -> None:
    """As `absl.app.run`, but a UserError ends the process with its message and status. Any other exception is a bug."""
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        sys.exit(stop.status)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags. What absl and config_flags report as a traceback becomes a UserError.

    `--config.FIELD=None` sets a field to None that is None in the schema; config_flags alone would take the word for a
    value of the field's type.
    """
    unset = [match[1] for word in argv if (match := re.fullmatch(r"--config\.([\w.]+)=None", word))]
    try:
        rest = flags.FLAGS([word for word in argv if not re.fullmatch(r"--config\.[\w.]+=None", word)])
        for field in unset:
            _set_to_none(flags.FLAGS["config"].value, field)
    except flags.Error as error:
        # An error of the config's own get_config arrives as the text of a traceback, whose last line is the message.
        _, found, message = str(error).rpartition("UserError: ")
        raise UserError(message.strip() if found else f"{error}; see --help") from error
    except OSError as error:
        raise UserError(f"--config: {str(error).splitlines()[0]} {str(error).splitlines()[-1].strip()}") from error
    except (AttributeError, KeyError, IndexError) as error:
        if "get_config" in str(error):
            raise UserError(f"--config: not a config file, it has no get_config ({error})") from error
        name = str(error).strip("'\"")
        raise UserError(f"--config: there is no field {name}; the fields are in configs/defaults.py") from error
    if len(rest) > 1:
        raise UserError(f"unexpected arguments {' '.join(rest[1:])}; see --help")
    if "config" in flags.FLAGS and flags.FLAGS["config"].present:
        path = re.split(r":(?=[^/]*$)", flags.FLAGS["config"].config_filename)[0]
        if not os.path.exists(path):
            raise UserError(f"--config: there is no file {path}")
    return rest


def _set_to_none(config, field: str) -> None:
    from polaformer_jax.config import defaults

    *parts, name = field.split(".")
    schema = defaults()
    for part in parts:
        config, schema = config[part], schema[part]
    if schema[name] is not None:
        raise UserError(f"--config.{field}=None: this field must have a value, such as {schema[name]!r}")
    config[name] = None
