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
