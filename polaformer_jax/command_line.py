"""How entry scripts start and end: flags in, and on an error that the user can put right one message, status 1.

Imports nothing heavy: processes that read data import the entry script, and so this file, again.
"""

import os
import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from polaformer_jax.errors import UserError


def run(main: Callable[[list[str]], None]) -> None:
    """As `absl.app.run`, but a UserError ends the process with its message alone. Any other exception is a bug."""
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        sys.exit(f"error: {error}")


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags. What absl and config_flags report as a traceback becomes a UserError."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        # An error of the config's own get_config arrives as the text of a traceback, whose last line is the message.
        _, found, message = str(error).rpartition("UserError: ")
        raise UserError(message.strip() if found else f"{error}; see --help") from error
    except (AttributeError, KeyError) as error:
        name = str(error).strip("'\"")
        raise UserError(f"the config has no field {name}; its fields are in configs/defaults.py") from error
    if len(rest) > 1:
        raise UserError(f"unexpected arguments {' '.join(rest[1:])}; see --help")
    if "config" in flags.FLAGS and flags.FLAGS["config"].present:
        path, _, _ = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
        if not os.path.exists(path):
            raise UserError(f"there is no config file {path}")
    return rest
