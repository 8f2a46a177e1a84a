"""The exception for invalid input of a user."""


class UserError(ValueError):
    """Invalid input. Commands print the message as one line and exit with code 2.

    The message names the file, key or flag at fault, its value, and what was expected.
    """
