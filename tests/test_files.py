"""Files and directories that are whole or absent."""

import pytest
from matplotlib.figure import Figure

from crrelu_llm.errors import DiskError
from crrelu_llm.files import replacing, write_figure, write_text

pytestmark = pytest.mark.quick


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "first")
    (path.parent / ".a.txt.1.tmp").write_text("half, of a process that was killed")
    (path.parent / ".b.txt.1.tmp").write_text("of another file")
    with replacing(path) as scratch:
        scratch.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert names(path.parent) == [".b.txt.1.tmp", "a.txt"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_error_leaves_what_was_there(kind, tmp_path):
    path = tmp_path / "out"
    path.mkdir() if kind == "directory" else path.write_text("first")
    with pytest.raises(KeyError), replacing(path) as scratch:
        scratch.mkdir() if kind == "directory" else scratch.write_text("half")
        raise KeyError
    assert names(tmp_path) == ["out"]
    assert kind == "directory" or path.read_text() == "first"


def test_a_directory_takes_the_place_of_an_empty_one_alone(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    with replacing(path) as scratch:
        scratch.mkdir()
        (scratch / "a").write_text("a")
    with pytest.raises(OSError, match="not empty"), replacing(path) as scratch:
        scratch.mkdir()
    assert names(tmp_path) == ["out"] and names(path) == ["a"]


def test_a_path_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"c could not be written: not a directory"):
        write_text(tmp_path / "file" / "b" / "c", "")


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_ending_says_the_format_of_a_figure(ending, begins, tmp_path):
    write_figure(tmp_path / f"a.{ending}", Figure(), dpi=50)
    assert (tmp_path / f"a.{ending}").read_bytes().startswith(begins)
    assert names(tmp_path) == [f"a.{ending}"]
