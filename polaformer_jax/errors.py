"""The error for what a user gave and can put right."""


class UserError(ValueError):
    """Says what was found, what was expected, and the way out. Entry scripts print the message alone."""
