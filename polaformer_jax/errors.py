"""Errors that the user can fix."""


class UserError(ValueError):
    """Says what was found, what was expected, and how to fix it. Commands print the message without a traceback.

    Args:
        message: names values and parameters as Python has them.
        argument: the name of the parameter whose value is at fault, where it is a single one. The text of the error
            begins with it; commands write the option that sets it instead.

    Attributes:
        message, argument: as given.
        status: the exit status of commands that end by this error.
    """

    status = 1

    def __init__(self, message: str, *, argument: str | None = None):
        super().__init__(message)
        self.message, self.argument = message, argument

    def __str__(self) -> str:
        return self.message if self.argument is None else f"{self.argument}: {self.message}"


class NotWrittenError(UserError):
    """A result that is there could not be written to its files. Commands print it all the same.

    Attributes:
        result: what the function that raised this would have returned.
    """

    def __init__(self, message: str, result: object):
        super().__init__(message)
        self.result = result


class WeightsError(UserError):
    """A file that holds no weights, or weights that do not fit the model."""

    status = 2


class Interrupted(Exception):
    """The run was requested to stop, and has saved what there was to save: the same command resumes it.

    Attributes:
        status: the exit status of commands that end by it; that of `sysexits.h` for "try again later".
    """

    status = 75
