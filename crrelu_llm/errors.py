"""The one error class for wrong input: its message is one line, and the command line turns it into exit status 2."""


class InputError(ValueError):
    """The user's input is wrong.

    The message is a single line that says what is wrong (with the value), where it came from, and what to do.
    """
