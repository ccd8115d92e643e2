"""Splits weights into parts for a transfer, with checksums, and joins them again. Needs only the standard library.

carry.py split SOURCE FOLDER [MEGABYTES]    a .gguf file or a checkpoint's directory -> FOLDER/weights-1-of-2, ...
carry.py sums FOLDER                        FOLDER/SHA256SUMS of all its files
carry.py check FOLDER                       checks that all parts of the weights are present and undamaged
carry.py join FOLDER TARGET                 FOLDER/weights-... -> the directory TARGET
"""

import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

PART = re.compile(r"weights-(\d+)-of-(\d+)")
SUMS = "SHA256SUMS"
MEGABYTES = 32  # the largest part, so that it fits into 50 MB together with the repository
_CHUNK = 1 << 20


class Refused(Exception):
    """An error that is reported in one line, with exit status 2."""


def split(source: Path, folder: Path, megabytes: float = MEGABYTES) -> None:
    """Writes a compressed archive of a file, or of the files of a directory, in parts of nearly equal size."""
    if not source.exists():
        raise Refused(f"{source}: no such file or directory; give a .gguf file or the directory of a checkpoint")
    if source.is_dir() and not (source / "config.json").is_file():
        raise Refused(f"{source}: no config.json in it; give a .gguf file or the directory of a checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("weights-*"):
        old.unlink()
    whole = folder / ".weights.tmp"
    files = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.is_file())
    try:
        with tarfile.open(whole, "w:xz", dereference=True) as archive:
            for path in files:
                archive.add(path, path.name)
        size = whole.stat().st_size
        count = max(1, -(-size // int(megabytes * 1e6)))
        with whole.open("rb") as stream:
            for index in range(count):
                end = size * (index + 1) // count
                with (folder / f"weights-{index + 1}-of-{count}").open("wb") as part:
                    while left := end - stream.tell():
                        part.write(stream.read(min(_CHUNK, left)))
    finally:
        whole.unlink(missing_ok=True)


def sums(folder: Path) -> None:
    """Writes the SHA-256 of each file in a folder, in the format of sha256sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))


def join(folder: Path, target: Path) -> None:
    """Joins the parts and unpacks them; keeps a target that already exists."""
    if target.is_dir():
        return
    parts = check(folder)
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with tarfile.open(fileobj=io.BufferedReader(_Joined(parts)), mode="r|xz") as archive:
        archive.extractall(scratch, filter="data")
    os.replace(scratch, target)


def check(folder: Path) -> list[Path]:
    """The parts in order; refuses missing parts and, if there are checksums, damaged ones."""
    parts, listing = _parts(folder), folder / SUMS
    if listing.is_file():
        lines = listing.read_text().splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for path in parts:
            if expected.get(path.name) != _digest(path):
                raise Refused(f"{path}: damaged, or not of this {SUMS}; copy it again")
    return parts


def _parts(folder: Path) -> list[Path]:
    found = {int(match[1]): (path, int(match[2])) for path in folder.glob("weights-*")
             if (match := PART.fullmatch(path.name))}  # fmt: skip
    if not found:
        raise Refused(f"{folder}: no weights there; run eval/gpu/pack.sh, or name a MODEL")
    counts = {count for _, count in found.values()}
    if len(counts) > 1:
        raise Refused(f"{folder}: parts of two packings; remove weights-* there, and copy one packing")
    count = counts.pop()
    missing = [f"weights-{index}-of-{count}" for index in range(1, count + 1) if index not in found]
    if missing:
        raise Refused(f"{folder}: missing: {', '.join(missing)}; copy them too")
    return [found[index][0] for index in range(1, count + 1)]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Joined(io.RawIOBase):
    """A concatenation of files that can be read once."""

    def __init__(self, paths: list[Path]):
        self._rest = list(paths)
        self._stream = self._rest.pop(0).open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while (count := self._stream.readinto(buffer)) == 0 and self._rest:
            self._stream.close()
            self._stream = self._rest.pop(0).open("rb")
        return count


def main(argv: list[str]) -> int:
    """Runs one of the four commands; the exit status is 2 for wrong input."""
    commands = {"split": split, "sums": sums, "check": check, "join": join}
    if len(argv) < 2 or argv[0] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        commands[argv[0]](*map(Path, argv[1:3]), *map(float, argv[3:]))
    except (Refused, OSError, EOFError, tarfile.TarError) as error:
        print(f"carry: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
