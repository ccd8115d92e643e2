"""The two error classes whose messages are one line: wrong input (exit status 2), and a disk that fails (1)."""


class InputError(ValueError):
    """The user's input is wrong.

    The message is a single line that says what is wrong (with the value), where it came from, and what to do.
    """


class DiskError(RuntimeError):
    """Something could not be written: a full disk, a limit, a directory that has become read-only.

    The message is a single line that says what could not be written and why, what is safe, and how to go on.
    """
