"""Finds a data set by name (built-in, local file or folder, hub); turns rows into text, a hash or token blocks."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crrelu_llm.data.beginning import beginning
from crrelu_llm.data.docstrings import load_docstrings
from crrelu_llm.data.messages import are_messages, text_of
from crrelu_llm.data.pairs import with_prompt_once
from crrelu_llm.errors import InputError, reading, reason_of
from crrelu_llm.files import disk_trouble

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("crrelu_llm")
BUILTIN = "builtin:"
_BUILTINS = {"docstrings": load_docstrings}
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".text": "text", ".csv": "csv"}
_COMPRESSIONS = {".gz", ".zst"}
# Groups of columns that make up a row's text; the first group whose first column is in the row is used as a whole.
_TEXT_COLUMNS = (("text",), ("messages",), ("prompt", "completion", "chosen"), ("question", "answer"), ("chosen",))


def load_dataset(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Loads a data set by name.

    Args:
        name: `builtin:docstrings`; a local file (json, jsonl, parquet, txt or csv, optionally .gz or .zst), whose rows
            become the split `train`; a local folder, with splits that `datasets` infers from the file names; or a hub
            name.
        config: the hub data set's configuration.
        streaming: read rows on demand instead of all at once.

    Returns:
        The splits by name.

    Raises:
        InputError: if the data set does not exist, is empty or cannot be read.
    """
    import datasets

    if name.startswith(BUILTIN):
        builtin = _BUILTINS.get(name.removeprefix(BUILTIN))
        if builtin is None:
            known = ", ".join(BUILTIN + key for key in _BUILTINS)
            raise InputError(f"{name}: no such built-in data set; known: {known}")
        splits = builtin()
        if streaming:
            return datasets.IterableDatasetDict({key: split.to_iterable_dataset() for key, split in splits.items()})
        return splits
    path = Path(name).expanduser()
    if path.is_file():
        return _load_file(path, streaming)
    if path.is_dir():
        if not any(path.iterdir()):
            raise InputError(f"{name}: the folder is empty; put data files (for example train.jsonl) into it")
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved(name, path, streaming)
        return _read(name, str(path), config, streaming=streaming)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or _reader(path) is not None:
        raise InputError(f"{name}: no such file or folder; check the path")
    return _load_from_hub(name, config, streaming)


def get_split(splits: Mapping[str, Any], name: str, source: str) -> Any:
    """Picks one split, or a slice of it.

    Args:
        splits: what `load_dataset` returned.
        name: the split's name, or a slice in the notation of `datasets`: `train[:90%]`, `train[90%:]`, `test[:200]`.
        source: the data set's name, for the message.

    Returns:
        The split's rows, in their order.

    Raises:
        InputError: if there is no such split (the message lists the existing ones), the slice cannot be read or is
            empty, or the rows are streamed, so that nobody knows how many there are.
    """
    if name in splits:
        return splits[name]
    base, bracket, _ = name.partition("[")
    if not bracket or base not in splits:
        raise InputError(f'{source}: no split "{name}"; it has: {", ".join(splits)}')
    if not hasattr(splits[base], "__len__"):
        raise InputError(f'{source}: "{name}" needs the number of rows, and streaming does not know it; name a split')
    try:
        rows = rows_of(name, len(splits[base]))
    except (ValueError, AssertionError) as error:
        raise InputError(f'{source}: cannot read the slice "{name}"; write one such as "{base}[:90%]"') from error
    if not rows:
        raise InputError(f'{source}: "{name}" has no rows; {base} has {len(splits[base])}')
    return splits[base].select(rows)


def rows_of(name: str, count: int) -> range:
    """The indices of a split's rows, or of a slice's, in a split of `count` rows."""
    import datasets

    (part,) = datasets.ReadInstruction.from_spec(name).to_absolute({name.partition("[")[0]: count})
    return range(part.from_ or 0, count if part.to is None else part.to)


def texts(split: Dataset | IterableDataset, limit: int | None = None) -> Iterator[str]:
    """Yields each row as plain text, for calibration and perplexity.

    The text comes from the first of these that the row has: `text`, `messages` (or `conversations`), `prompt` with
    `completion` or `chosen`, `question` with `answer`, `chosen` alone. Of messages, the contents are used; parts are
    separated by a blank line.

    Args:
        split: the rows.
        limit: the most rows to read.

    Yields:
        One string per row; rows without text are skipped, with a warning that gives their number.

    Raises:
        InputError: if the rows have none of these columns, or a column does not hold text.
    """
    empty = total = 0
    for row in itertools.islice(split, limit):
        total += 1
        with reading(f"row {total}", ours=True):
            text = _text_of_row(row)
        if text.strip():
            yield text
        else:
            empty += 1
    if empty:
        logger.warning("%d of %d rows have no text and are left out", empty, total)


def _text_of_row(given: Mapping[str, Any]) -> str:
    row = dict(given)
    if not any(group[0] in row for group in _TEXT_COLUMNS) and "conversations" not in row:
        raise InputError(
            f"the data has no text column: found {', '.join(row)}; expected text, messages, prompt with "
            "completion or chosen, or question with answer"
        )
    if row.get("conversations"):
        from trl.data_utils import maybe_convert_to_chatml

        row = maybe_convert_to_chatml(copy.deepcopy(row))
    if row.get("chosen") and not row.get("text") and not row.get("messages"):
        row |= with_prompt_once(row)
    columns = next((group for group in _TEXT_COLUMNS if row.get(group[0])), ())
    return "\n\n".join(part for key in columns if (part := _plain(key, row.get(key))))


def sha256(split: Iterable[Mapping[str, Any]]) -> str:
    """Hashes the content of the rows of a split, in order.

    Args:
        split: the rows; all are read.

    Returns:
        The hexadecimal SHA-256 of the rows as canonical JSON lines: the same on every machine.
    """
    digest = hashlib.sha256()
    for row in split:
        content = {key: _content(value) for key, value in row.items()}
        line = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
        # Text from the web may contain lone surrogates, which plain UTF-8 refuses.
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _content(value: Any) -> Any:
    """A value; an undecoded image is represented by the hash of its file, without the path."""
    if not isinstance(value, dict) or value.keys() != {"bytes", "path"}:
        return value
    content = value["bytes"]
    if content is None and value["path"]:
        content = Path(value["path"]).read_bytes()
    return None if content is None else hashlib.sha256(content).hexdigest()


def token_blocks(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, limit_tokens: int | None = None
) -> torch.Tensor:
    """Joins texts, each followed by the end-of-sequence token, and cuts them into equal blocks.

    Each block starts with the tokens that the tokenizer puts before a text (see `beginning`).

    Args:
        texts: the texts; only as many as needed are read.
        tokenizer: the model's tokenizer.
        block_size: tokens in a block.
        limit_tokens: the most tokens to use, including the first tokens of the blocks.

    Returns:
        Token ids of shape (blocks, block_size), int64. A last, incomplete block is dropped.

    Raises:
        InputError: if the texts do not fill one block.
    """
    import torch

    first = beginning(tokenizer)
    room = block_size - len(first)
    if room < 1:
        raise InputError(f"blocks of {block_size} tokens have no room for text: {len(first)} begin each")
    most = None if limit_tokens is None else limit_tokens // block_size * room
    ids: list[int] = []
    for text in texts:
        if most is not None and len(ids) >= most:
            break
        # verbose=False: the texts are cut afterwards, so their length needs no warning
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    available = len(ids) if limit_tokens is None else min(len(ids), limit_tokens)
    blocks = (available if most is None else min(len(ids), most)) // room
    if blocks == 0:
        raise InputError(f"{available} tokens of text do not fill one block of {block_size}; give more text")
    text = torch.tensor(ids[: blocks * room], dtype=torch.long).view(blocks, room)
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(blocks, -1), text], 1)


def _reader(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return _READERS.get(suffixes[-1]) if suffixes else None


def _load_file(path: Path, streaming: bool) -> DatasetDict | IterableDatasetDict:
    reader = _reader(path)
    if reader is None:
        known = ", ".join(suffix[1:] for suffix in _READERS)
        raise InputError(f"{path}: unknown file format; known suffixes: {known} (also with .gz or .zst)")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return _read(str(path), reader, None, data_files={"train": str(path)}, streaming=streaming)


def _saved(source: str, path: Path, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """Data saved with `save_to_disk`: several splits, or a single one, which becomes `train`."""
    import datasets

    with reading(source, "save it again with save_to_disk"):
        found = datasets.load_from_disk(str(path))
        splits = found if isinstance(found, datasets.DatasetDict) else datasets.DatasetDict({"train": found})
    _require_rows(source, splits)
    if streaming:
        return datasets.IterableDatasetDict({key: split.to_iterable_dataset() for key, split in splits.items()})
    return splits


def _read(source: str, builder: str, config: str | None, **options: Any) -> DatasetDict | IterableDatasetDict:
    """Reads local data, with messages that name the source."""
    import datasets

    try:
        with _no_progress_bars():
            splits = datasets.load_dataset(builder, config, **options)
    except Exception as error:  # the readers raise errors of many libraries; all mean invalid data
        # an empty compressed file, as JSON and as text
        if disk_trouble(error):
            raise
        reason = reason_of(error)
        if isinstance(error, StopIteration) or "at least one example" in reason or "StopIteration" in reason:
            raise InputError(f"{source}: the file holds no rows") from error
        raise InputError(f"{source}: cannot be read: {reason}; check that the data is whole") from error
    _require_rows(source, splits)
    return splits


def _require_rows(source: str, splits: Mapping[str, Any]) -> None:
    for name, split in splits.items():
        # A row is read only if rows cannot be counted, because reading it would open its images.
        if len(split) == 0 if hasattr(split, "__len__") else next(iter(split), None) is None:
            raise InputError(f'{source}: the split "{name}" has no rows')


def _load_from_hub(name: str, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    import datasets

    try:
        return datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # no network, unknown name, no access, unknown configuration: the user must correct it
        if disk_trouble(error):
            raise
        raise InputError(
            f"{name}: neither a local file nor a local folder, and not available from the hub ({reason_of(error)}); "
            "check the name, or download the data and give its path"
        ) from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _plain(column: str, value: Any) -> str:
    """The text of a column: the string itself, the contents of a list of messages, or nothing for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if are_messages(value):
        return "\n\n".join(text for message in value if (text := text_of(message.get("content"))))
    raise InputError(f"{column} is neither text nor messages: {value!r:.60}")
