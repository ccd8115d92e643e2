"""The built-in corpus: disjoint splits, the same every time, large enough for every use."""

import inspect
import itertools
import json
import os
import subprocess
import sys
import textwrap

import pytest

from crrelu_llm.data import docstrings, load_dataset, sha256
from crrelu_llm.errors import InputError

CHARACTERS = {"pretrain": 900_000, "train": 200_000, "test": 90_000, "calibration": 90_000}


@pytest.fixture(scope="module")
def corpus():
    return load_dataset("builtin:docstrings")


def test_splits_rows_and_sizes(corpus):
    assert tuple(corpus) == docstrings.SPLITS
    for split, least in CHARACTERS.items():
        assert corpus[split].column_names == ["text", "module", "name"]
        assert sum(map(len, corpus[split]["text"])) > least
        assert min(map(len, corpus[split]["text"])) >= docstrings.MINIMUM_CHARACTERS


def test_splits_share_no_module_and_no_text(corpus):
    tops, normalised = {}, {}
    for name, split in corpus.items():
        tops[name] = {module.partition(".")[0] for module in split["module"]}
        normalised[name] = {" ".join(text.split()) for text in split["text"]}
    for one, other in itertools.combinations(corpus, 2):
        assert tops[one].isdisjoint(tops[other])
        assert normalised[one].isdisjoint(normalised[other])


def test_texts_are_the_documentation(corpus):
    rows = {row["name"]: row for split in corpus.values() for row in split.to_list()}
    for thing in (json.JSONEncoder, textwrap.TextWrapper, textwrap.dedent):
        row = rows[f"{thing.__module__}.{thing.__qualname__}"]
        assert row["text"] == inspect.getdoc(thing)
        assert row["module"] == thing.__module__


def test_a_module_and_its_python_twin_are_in_one_split():
    assert docstrings.split_of("_pydecimal") == docstrings.split_of("decimal")
    assert docstrings.split_of("_threading_local") == docstrings.split_of("threading_local.inner")
    assert docstrings.split_of("email.message") == docstrings.split_of("email")


def test_every_share_of_the_hash_range_is_used():
    names = [f"module{i}" for i in range(4000)]
    shares = {split: sum(docstrings.split_of(name) == split for name in names) / 4000 for split in docstrings.SPLITS}
    expected = {"pretrain": 0.62, "train": 0.23, "test": 0.07, "calibration": 0.08}
    assert shares == pytest.approx(expected, abs=0.03)


def test_another_process_builds_the_same_corpus(corpus):
    code = (
        "from crrelu_llm.data import docstrings, sha256\n"
        "for name, rows in docstrings._rows().items(): print(name, sha256(rows))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.splitlines() == [f"{name} {sha256(split)}" for name, split in corpus.items()]


def test_definitions_are_found_wherever_they_stand(tmp_path):
    text = "A text that is long enough to be kept by the corpus."
    source = (
        f'"""{text} 0"""\nif True:\n    class A:\n        """{text} 1"""\n        async def f(self):\n'
        f'            """{text} 2"""\n            def g():\n                """{text} 3"""\n'
        f'try:\n    def h():\n        """{text} 4"""\nexcept ImportError:\n    pass\nelse:\n    def k():\n'
        f'        """{text} 5"""\n'
    )
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text(source)
    (tmp_path / "json" / "test").mkdir()
    (tmp_path / "json" / "test" / "left_out.py").write_text(source)
    (tmp_path / "not_in_the_library.py").write_text(source)
    (tmp_path / "this.py").write_text("def broken(:\n")
    found = [row for row in docstrings._documentation(tmp_path) if row[0] == "json"]
    names = ["json", "json.A", "json.A.f", "json.A.f.g", "json.h", "json.k"]
    assert found == [("json", name, f"{text} {i}") for i, name in enumerate(names)]
    assert {row[0] for row in docstrings._documentation(tmp_path)} == {"json", "pydoc_data.topics"}


def test_a_library_without_sources_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match=r"builtin:docstrings: .* train, test, calibration") as caught:
        docstrings._rows.__wrapped__()
    assert "\n" not in str(caught.value)
