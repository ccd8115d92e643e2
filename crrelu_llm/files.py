"""Atomic writes of files, JSON without NaN, and errors for a full or read-only disk."""

import contextlib
import errno
import json
import math
import numbers
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crrelu_llm.errors import DiskError, InputError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_PERMISSION = (errno.EACCES, errno.EPERM, errno.ENOTDIR)
_LOCK = ".lock"


def plain(value: Any) -> Any:
    """Copies a value into plain JSON values; non-finite numbers, which JSON lacks, become None."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, as `write_text` does."""
    write_text(path, json.dumps(plain(content), indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all; creates the directory if it does not exist.

    Raises:
        DiskError: The disk is full or read-only; the previous file, if any, is unchanged.
    """
    with writing(str(path)), replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_figure(path: Path, figure: Any, dpi: int) -> None:
    """Writes a matplotlib figure, whole or not at all, in the format that the ending of `path` names."""
    with writing(str(path)), replacing(path) as scratch:
        figure.savefig(scratch, dpi=dpi, format=path.suffix.removeprefix("."))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` for a new file or directory, which then takes the name and the place of `path`.

    A directory takes the place of an empty one alone. An error within removes what is new and leaves `path` as it was.

    Raises:
        DiskError: The disk is full or read-only. What the caller writes is the caller's to guard, with `writing`.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
    try:
        yield scratch
        with writing(str(path)):
            sync(scratch)
            if scratch.is_dir() and path.is_dir():
                path.rmdir()
            os.replace(scratch, path)
    finally:
        remove(scratch)


def is_leftover(path: Path) -> bool:
    """Whether a file or directory is a leftover of a killed writer, or the lock file of `alone`."""
    return path.name.endswith(_LOCK) or (path.name.startswith(".") and path.name.endswith(".tmp"))


def remove_leftovers(path: Path) -> None:
    """Removes the leftovers of killed writers of `path`, `.NAME.PROCESS.tmp`; nobody else may be writing `path`."""
    leftover = re.compile(rf"\.{re.escape(path.name)}\.(\d+|removed)\.tmp")  # not those of `NAME.MORE`
    for other in path.parent.glob(".*.tmp"):
        if leftover.fullmatch(other.name):
            remove(other)


@contextlib.contextmanager
def alone(directory: Path, command: str, name: str = _LOCK) -> Iterator[None]:
    """A context that locks a directory, because two calls there would overwrite each other's files.

    The directory is created, and removed again if it stays empty.

    Args:
        directory: An output directory.
        command: The name of the command for messages, `crrelu eval`.
        name: The name of the lock file there; it ends in `.lock`.

    Raises:
        InputError: Another call holds the lock, or a file or link is in the place of the directory or the lock file.
        DiskError: The directory cannot be created or written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    lock = directory.resolve() / name
    absent = [path for path in (lock.parent, *lock.parent.parents) if not path.exists()]
    try:
        with writing(str(directory)):
            directory.mkdir(parents=True, exist_ok=True)  # refuses a dangling link
            file = open(lock, "a")  # noqa: SIM115
    except (FileExistsError, IsADirectoryError) as error:  # a dangling link, or something else of that name
        reason = str(error.strerror).lower()
        raise InputError(
            f"output_dir {directory}: {error.filename} stands in the way ({reason}); remove it, or give another "
            "directory"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock of a killed process is released
        except BlockingIOError:
            raise InputError(
                f"output_dir {directory}: another `{command}` is at work there; wait until it has ended, or give "
                "another directory"
            ) from None
        except OSError:  # a file system without locks
            pass
        if not (lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())):
            # The previous holder has removed the lock file in the meantime; a new call would create another one.
            raise InputError(f"output_dir {directory}: another `{command}` has just ended there; run it again")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # removes only empty directories
                for path in absent:
                    path.rmdir()


def remove(path: Path) -> None:
    """Removes a file or a whole directory, present or not.

    A directory is renamed first, so that a directory of that name is complete even if the removal is killed.
    """
    if path.is_dir() and not path.is_symlink():
        gone = path if is_leftover(path) else path.with_name(f".{path.name}.removed.tmp")
        if gone != path:
            shutil.rmtree(gone, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another host on the same disk was first
                os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or every file below a directory, is on disk, so that a rename does not precede the content.

    Files that a library created for their owner only, as safetensors does, get the permissions of the umask.
    """
    for file in [path, *path.rglob("*")]:
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(0o666 & ~_umask())
        number = os.open(file, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some file systems do not support it
                raise
        finally:
            os.close(number)


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it
    os.umask(mask)
    return mask


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns a failure of the disk into a DiskError, "`what` could not be written: why"; other errors pass."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        reason = disk_trouble(error, permission=True)
        if reason is None:
            raise
        raise DiskError(f"{what} could not be written: {reason}") from error


def disk_trouble(error: BaseException, permission: bool = False) -> str | None:
    """Why the disk refused, if an error is one of the disk, else None.

    Args:
        error: From Python, safetensors or torch.save; each reports it differently.
        permission: Whether a lack of permission counts too.
    """
    refused = _DISK + (_PERMISSION if permission else ())
    text = str(error)
    if isinstance(error, OSError) and error.errno in refused:
        return str(error.strerror).lower()
    found = re.search(r"\(os error (\d+)\)", text)  # safetensors
    if found and type(error).__name__ == "SafetensorError" and int(found[1]) in refused:
        return os.strerror(int(found[1])).lower()
    if isinstance(error, RuntimeError) and ("inline_container.cc" in text or "iostream error" in text):
        return "the disk is full, or a limit on file sizes is reached"  # torch.save does not report the reason
    before = error.__cause__ or error.__context__
    return None if before is None else disk_trouble(before, permission)
