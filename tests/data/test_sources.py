"""Data sets by name: every format, every way to be wrong; rows as text, hash and token blocks."""

import csv
import gzip
import hashlib
import json
import re

import datasets
import pytest

from crrelu_llm.assets import nano_path
from crrelu_llm.data import get_split, load_dataset, sha256, texts, token_blocks
from crrelu_llm.errors import InputError

ROWS = [{"text": "One line of text."}, {"text": "Añother, with “quotes”."}, {"text": "Third"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path, name):
    """Writes ROWS under a name whose ending tells the format."""
    target = path / name
    if ".parquet" in name:
        datasets.Dataset.from_list(ROWS).to_parquet(str(target))
        return target
    if ".csv" in name:
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text"])
            writer.writeheader()
            writer.writerows(ROWS)
        return target
    if ".json" in name and ".jsonl" not in name:
        content = json.dumps(ROWS).encode()
    elif ".jsonl" in name:
        content = json_lines(ROWS)
    else:
        content = "".join(row["text"] + "\n" for row in ROWS).encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = pytest.importorskip("zstandard").compress(content)
    target.write_bytes(content)
    return target


NAMES = ["a.json", "b.jsonl", "c.parquet", "d.txt", "e.csv", "f.jsonl.gz", "g.txt.gz", "h.json.gz", "i.v2.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_local_files(tmp_path, name):
    loaded = load_dataset(str(write(tmp_path, name)))
    assert list(loaded) == ["train"]
    assert loaded["train"].to_list() == ROWS


def test_streaming(tmp_path):
    loaded = load_dataset(str(write(tmp_path, "rows.jsonl.gz")), streaming=True)
    assert isinstance(loaded["train"], datasets.IterableDataset)
    assert list(loaded["train"]) == ROWS
    corpus = load_dataset("builtin:docstrings", streaming=True)
    assert isinstance(corpus["test"], datasets.IterableDataset)
    assert next(iter(corpus["test"])) == load_dataset("builtin:docstrings")["test"][0]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines(ROWS))
    assert len(load_dataset(str(path))["train"]) == 3
    path.write_bytes(json_lines(ROWS[:1] * 5))
    assert load_dataset(str(path))["train"].to_list() == ROWS[:1] * 5


def test_folders(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "train.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS)))
    (flat / "eval.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS[:1])))
    loaded = load_dataset(str(flat))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 3, "test": 1}

    nested = tmp_path / "nested"
    for split in ("train", "validation"):
        (nested / "data" / split).mkdir(parents=True)
        (nested / "data" / split / "part.jsonl").write_bytes(json_lines(ROWS))
    assert set(load_dataset(str(nested))) == {"train", "validation"}


def break_nothing(path):
    return path / "missing.jsonl"


def make(name, content):
    def write_it(path):
        (path / name).write_bytes(content)
        return path / name

    return write_it


def make_folder(path):
    (path / "hollow").mkdir()
    return path / "hollow"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (break_nothing, "no such file or folder"),
        (make("empty.jsonl", b""), "the file is empty"),
        (make("empty.jsonl.gz", gzip.compress(b"")), "the file holds no rows"),
        (make("blank.txt.gz", gzip.compress(b"")), "the file holds no rows"),
        (make("broken.jsonl", b'{"text": "whole"}\n{"text": half\n'), "cannot be read"),
        (make("broken.json", b'{"text": '), "cannot be read"),
        (make("cut.jsonl.gz", gzip.compress(json_lines(ROWS) * 50)[:40]), "cannot be read"),
        (make("no.parquet", b"PAR1 this is not one"), "cannot be read"),
        (make("weights.bin", b"1234"), "known suffixes: json, jsonl, parquet"),
        (make_folder, "the folder is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_local_data(tmp_path, prepare, message):
    path = prepare(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_dataset(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_builtin_lists_the_known():
    with pytest.raises(InputError, match=r"builtin:docstring: .*known: builtin:docstrings"):
        load_dataset("builtin:docstring")


def test_unreachable_hub_name(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/nothing: neither a local file nor a local folder") as caught:
        load_dataset("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_hub_names_are_passed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or "splits")
    assert load_dataset("owner/name", "en", streaming=True) == "splits"
    assert asked == [(("owner/name", "en"), {"streaming": True})]


def test_get_split():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    assert get_split(splits, "train", "x.jsonl") is splits["train"]
    with pytest.raises(InputError, match=r'x\.jsonl: no split "test"; it has: train'):
        get_split(splits, "test", "x.jsonl")


def test_slices_of_a_split():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": str(number)} for number in range(50)]))

    def numbers(name):
        return [int(text) for text in get_split(splits, name, "x.jsonl")["text"]]

    assert numbers("train[:3]") == [0, 1, 2]
    assert numbers("train[-2:]") == [48, 49]
    assert numbers("train[:90%]") + numbers("train[90%:]") == list(range(50))  # a file without a test split


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test[:5]", 'no split "test[:5]"; it has: train'),
        ("train[:x]", 'cannot read the slice "train[:x]"; write one such as "train[:90%]"'),
        ("train[:200%]", "cannot read the slice"),
        ("train[", "cannot read the slice"),
        ("train[:2]+train[9:]", "cannot read the slice"),
        ("train[60:]", '"train[60:]" has no rows; train has 50'),
        ("train[9:4]", "has no rows"),
    ],
)
def test_wrong_slices(name, message):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "a"}] * 50))
    with pytest.raises(InputError, match=re.escape(f"x.jsonl: {message}" if "no split" in message else message)):
        get_split(splits, name, "x.jsonl")
    if name.startswith("train"):
        streamed = {"train": splits["train"].to_iterable_dataset()}
        with pytest.raises(InputError, match="needs the number of rows, and streaming does not know it"):
            get_split(streamed, name, "x.jsonl")


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "plain", "label": 3}, "plain"),
        ({"messages": [message("user", "Q"), message("assistant", "A")]}, "Q\n\nA"),
        ({"prompt": "P", "completion": "C"}, "P\n\nC"),
        ({"prompt": [message("user", "P")], "chosen": [message("assistant", "C")], "rejected": []}, "P\n\nC"),
        ({"question": "1 + 1?", "answer": "2"}, "1 + 1?\n\n2"),
        ({"chosen": [message("user", "Q"), message("assistant", "A")], "rejected": []}, "Q\n\nA"),
        ({"messages": [message("user", "Q"), message("assistant", None)]}, "Q"),
    ],
)
def test_texts(row, expected):
    assert list(texts(datasets.Dataset.from_list([row]))) == [expected]


def test_texts_limit_empty_rows_and_unknown_columns():
    rows = [*ROWS, {"text": " \n"}, {"text": None}, {"text": "last"}]
    split = datasets.Dataset.from_list(rows)
    assert list(texts(split)) == ["One line of text.", "Añother, with “quotes”.", "Third", "last"]
    assert list(texts(split, limit=2)) == ["One line of text.", "Añother, with “quotes”."]
    with pytest.raises(InputError, match="found goal, label"):
        list(texts(datasets.Dataset.from_list([{"goal": "g", "label": 1}])))


def test_sha256_sees_content_and_order_only(tmp_path):
    split = datasets.Dataset.from_list([{"a": 1, "b": "é"}, {"a": 2, "b": None}])
    swapped = datasets.Dataset.from_list([{"b": "é", "a": 1}, {"b": None, "a": 2}])
    assert sha256(split) == sha256(swapped) == sha256(split.to_iterable_dataset())
    assert sha256(split) != sha256(split.select([1, 0]))
    assert sha256(split) != sha256(split.select([0]))
    assert sha256(split) == hashlib.sha256('{"a":1,"b":"é"}\n{"a":2,"b":null}\n'.encode()).hexdigest()
    from_file = load_dataset(str(write(tmp_path, "rows.jsonl")))["train"]
    assert sha256(from_file) == sha256(datasets.Dataset.from_list(ROWS))


def test_token_blocks():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano_path())
    parts = ["Return the name.", "Raise an error if it is missing."]
    stream = [id for part in parts for id in [*tokenizer(part)["input_ids"], tokenizer.eos_token_id]]
    blocks = token_blocks(iter(parts), tokenizer, 3)
    assert blocks.shape == (len(stream) // 3, 3)
    assert blocks.flatten().tolist() == stream[: len(stream) // 3 * 3]
    assert token_blocks(iter(parts), tokenizer, 3, limit_tokens=7).flatten().tolist() == stream[:6]
    with pytest.raises(InputError, match="do not fill one block of 512"):
        token_blocks(parts, tokenizer, 512)

    def endless():
        while True:
            yield parts[0]

    assert token_blocks(endless(), tokenizer, 4, limit_tokens=40).shape == (10, 4)


PARTS = [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "!"}]}]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": PARTS}, "Q!"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q\n\nA"),
        ({"text": None, "messages": [{"role": "user", "content": "Q"}]}, "Q"),
        (
            {
                "prompt": "Q",
                "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
                "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
            },
            "Q\n\nA",
        ),
    ],
)
def test_texts_are_read_row_by_row(row, text):
    assert list(texts([row])) == [text]


def test_rows_without_text_are_counted(caplog):
    assert list(texts([{"text": "a"}, {"text": None}, {"text": " "}])) == ["a"]
    assert "2 of 3 rows have no text" in caplog.text


@pytest.mark.parametrize("value", [3, ["a"], [{"content": "a"}], [{"role": "user", "content": 3}]])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(InputError, match=r"row 2: .*3|row 2: .*a"):
        list(texts([{"text": "a"}, {"messages": value}]))


@pytest.mark.parametrize("several", [True, False])
def test_what_save_to_disk_wrote(tmp_path, several):
    import datasets

    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    (datasets.DatasetDict({"train": rows, "test": rows}) if several else rows).save_to_disk(str(tmp_path / "saved"))
    for streaming in (False, True):
        found = load_dataset(str(tmp_path / "saved"), streaming=streaming)
        assert [row["text"] for row in found["train"]] == ["a", "b"]
        assert ("test" in found) == several
