"""The errors for what a user gave and can put right."""


class UserError(ValueError):
    """Says what was found, what was expected, and the way out. Entry scripts print the message alone.

    Attributes:
        status: the exit status with which entry scripts then end.
    """

    status = 1


class WeightsError(UserError):
    """A file that holds no weights, or weights that do not fit the model."""

    status = 2


class Interrupted(Exception):
    """The run was told to stop, and has saved what there was to save: the same command goes on.

    Attributes:
        status: the exit status with which entry scripts then end; that of `sysexits.h` for "try again later".
    """

    status = 75
