"""Images in data sets: their hash, and the columns that hold none."""

import pytest
from pictures import folder, picture

from crrelu_llm.data import load_dataset, sha256
from crrelu_llm.data.images import image_column, label_names, undecoded
from crrelu_llm.errors import InputError


def train(path):
    return load_dataset(str(path))["train"]


def test_the_hash_is_of_the_images_wherever_they_are(tmp_path):
    first, second = (sha256(undecoded(train(folder(tmp_path / at, 3, 3)), "image", "x")) for at in ("a", "b"))
    assert first == second
    picture("dark", 99).save(tmp_path / "c.png")
    (tmp_path / "c.png").replace(tmp_path / "b" / "train" / "dark" / "1.png")
    assert sha256(undecoded(train(tmp_path / "b"), "image", "x")) != first


def test_columns_are_told_by_what_they_hold(tmp_path):
    from datasets import Dataset

    rows = train(folder(tmp_path / "data", 3, 3))
    assert image_column(rows, "x") == "image" and label_names(rows, "label", "x") == ["bright", "dark", "striped"]
    texts = Dataset.from_dict({"text": ["a", "b"], "score": [0.5, 1.0], "kind": ["v", "u"], "number": [2, 0]})
    assert label_names(texts, "kind", "x") == ["u", "v"] and label_names(texts, "number", "x") == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"the column score holds 0\.5, not labels; set label_column_name"):
        label_names(texts, "score", "x")
    with pytest.raises(InputError, match=r"the column score holds .*, not images; set image_column_name"):
        undecoded(texts, "score", "x")
    with pytest.raises(InputError, match="x: no column holds images: found text, score, kind, number"):
        image_column(texts, "x")
