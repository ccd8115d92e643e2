"""The two error classes with one-line messages: wrong input (exit status 2) and a failing disk (1). Also turns any
error that a library raises while it reads a user's input into such a message."""

import contextlib
from collections.abc import Iterator

_LONGEST = 300
# Failures of the machine, which do not mean that the input is wrong.
_MACHINE = (MemoryError, RecursionError)


class InputError(ValueError):
    """The user's input is wrong.

    The message is a single line that says what is wrong (with the value), where the value came from, and what to do.
    """


class DiskError(RuntimeError):
    """A file could not be written: the disk is full, a limit is reached, or a directory has become read-only.

    The message is a single line that says what could not be written and why, what is safe, and how to continue.
    """


@contextlib.contextmanager
def reading(what: str, remedy: str = "", ours: bool = False) -> Iterator[None]:
    """Turns any error that a library raises while it reads a user's input into an InputError: "`what`: why; `remedy`".

    The libraries have no common class for wrong input, and a list of their classes would never be complete. With
    `--debug` the traceback is shown as well.

    Args:
        what: The file, the row or the option that is being read.
        remedy: What to do about it.
        ours: Whether `what` is also put before the message of an InputError, which otherwise passes unchanged.
    """
    try:
        yield
    except InputError as error:
        if not ours:
            raise
        raise InputError(f"{what}: {error}" + (f"; {remedy}" if remedy else "")) from error
    except DiskError:
        raise
    except Exception as error:
        if isinstance(error, _MACHINE) or type(error).__name__ == "OutOfMemoryError" or _is_of_the_disk(error):
            raise
        raise InputError(f"{what}: {reason_of(error)}" + (f"; {remedy}" if remedy else "")) from error


def reason_of(error: BaseException) -> str:
    """The message of an error in one short line, with the name of its class where the message alone is not clear.

    For a chain of errors, the message of the first one, which was raised where the fault occurred.
    """
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = " ".join(str(error).split())
    name = type(error).__name__
    if len(text) < 20 or isinstance(error, (KeyError, IndexError, TypeError, AttributeError)):
        text = f"{name}: {text}" if text else name
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _is_of_the_disk(error: BaseException) -> bool:
    from crrelu_llm.files import disk_trouble

    return disk_trouble(error) is not None
