"""The two error classes whose messages are one line: wrong input (exit status 2), and a disk that fails (1); and what
makes one line of whatever the libraries raise while they read a user's input."""

import contextlib
from collections.abc import Iterator

_LONGEST = 300
# Where the machine gives way, the input need not be wrong.
_MACHINE = (MemoryError, RecursionError)


class InputError(ValueError):
    """The user's input is wrong.

    The message is a single line that says what is wrong (with the value), where it came from, and what to do.
    """


class DiskError(RuntimeError):
    """Something could not be written: a full disk, a limit, a directory that has become read-only.

    The message is a single line that says what could not be written and why, what is safe, and how to go on.
    """


@contextlib.contextmanager
def reading(what: str, remedy: str = "", ours: bool = False) -> Iterator[None]:
    """Turns whatever a library raises while it reads what the user gave into an InputError: "`what`: why; `remedy`".

    The libraries have no common class for wrong input, and a list of those seen so far would always lack one. With
    `--debug` the traceback is shown as well.

    Args:
        what: The file, the row or the option that is being read.
        remedy: What to do about it.
        ours: Whether an InputError, which says by itself what is wrong, is told where, too.
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
    """What an error says, in one line that is not too long; its class where the text alone says nothing.

    Of a chain of errors the one that the others were made from: it was raised where the fault was met.
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
