"""The checkpoint a run starts from: made once, used again only while it is the same."""

import os
import shutil

import numpy as np
import pytest
from runs import sft_rows
from safetensors.torch import load_file, save_file

from crrelu_llm.errors import InputError
from crrelu_llm.patching import PatchConfig
from crrelu_llm.training.arguments import parse
from crrelu_llm.training.prepare import datasets_of, starting_checkpoint

CONFIG = PatchConfig(calibration="none")


@pytest.fixture
def source(tiny_checkpoint, tmp_path):
    """A checkpoint of the test's own."""
    return str(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


def test_a_copy_is_made_once(source, tmp_path):
    made = starting_checkpoint(source, CONFIG, tmp_path / "out")
    stamp = os.stat(f"{made}/model.safetensors").st_mtime_ns
    assert os.path.isabs(made)
    assert starting_checkpoint(source, CONFIG, tmp_path / "out") == made
    assert os.stat(f"{made}/model.safetensors").st_mtime_ns == stamp


def test_a_copy_of_other_weights_is_not_used_again(source, tmp_path):
    starting_checkpoint(source, CONFIG, tmp_path / "out")
    weights = load_file(f"{source}/model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, f"{source}/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="holds another patched checkpoint"):
        starting_checkpoint(source, CONFIG, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [{"config": PatchConfig(epsilon_init=0.3, calibration="none")}, {"dtype": "bfloat16"}, {"revision": "main"}],
)
def test_a_copy_made_in_another_way_is_not_used_again(source, tmp_path, change):
    starting_checkpoint(source, CONFIG, tmp_path / "out")
    with pytest.raises(InputError, match="holds another patched checkpoint"):
        starting_checkpoint(source, change.pop("config", CONFIG), tmp_path / "out", **change)


def test_a_patched_model_is_taken_as_it_is_or_refused(source, tmp_path):
    made = starting_checkpoint(source, CONFIG, tmp_path / "out")
    assert starting_checkpoint(made, CONFIG, tmp_path / "again") == made
    assert not (tmp_path / "again").exists()
    for other in (PatchConfig("gelu"), PatchConfig(epsilon_per="channel")):
        with pytest.raises(InputError, match="is already patched"):
            starting_checkpoint(made, other, tmp_path / "again")


def test_an_unpatched_model_needs_no_copy(source, tmp_path):
    assert starting_checkpoint(source, None, tmp_path / "out") == source
    assert not (tmp_path / "out").exists()


def test_sft_reads_the_text_column_that_the_recipe_names(workshop):
    rows = [{"chosen": row["text"], "rejected": "no"} for row in sft_rows()]
    data = workshop.data("sft", train=rows, test=rows)
    record = workshop.run("sft", "named", dataset_name=data, dataset_text_field="chosen")
    assert record["steps"] == 3
    others = [{"question": row["chosen"], "reply": "no"} for row in rows]
    with pytest.raises(InputError, match=r"sft needs a column messages or text, .*, not question, reply"):
        workshop.run("sft", "unnamed", dataset_name=workshop.data("sft", train=others, test=others))


def test_a_mixture_holds_out_the_same_rows_in_every_call(workshop):
    path = workshop.data("sft", train=sft_rows()) + "/train.jsonl"
    mixed = {"datasets": [{"path": "json", "data_files": path, "split": "train"}], "test_split_size": 0.25}
    options = {"dataset_name": None} | mixed
    found = []
    for seed in (1, 2):
        np.random.seed(seed)
        train, test = datasets_of(parse("sft", workshop.argv("sft", "mixed", **options)), always_test=True)
        found.append((train["text"], test["text"]))
    assert found[0] == found[1] and len(found[0][1]) == 4 and not set(found[0][0]) & set(found[0][1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"streaming": True, "test_split_size": 0.25}, "test_split_size does not go with streaming"),
        ({"test_split_size": 2.5}, r"test_split_size: .*2\.5.*; give a share between 0 and 1"),
    ],
)
def test_a_test_split_that_cannot_be_is_refused(workshop, options, said):
    path = workshop.data("sft", train=sft_rows()) + "/train.jsonl"
    options |= {"dataset_name": None, "datasets": [{"path": "json", "data_files": path, "split": "train"}]}
    with pytest.raises(InputError, match=said):
        datasets_of(parse("sft", workshop.argv("sft", "mixed", **options)), always_test=True)


@pytest.mark.parametrize(
    ("train", "test", "shared"),
    [
        *(("train", "train", True), ("train", "train[50%:]", True), ("train[:60%]", "train[8:]", True)),
        *(("train[:50%]", "train[50%:]", False), ("train", "test", False)),
    ],
)
def test_evaluation_rows_that_are_training_rows_are_refused(workshop, train, test, shared):
    recipe = parse("sft", workshop.argv("sft", "split", dataset_train_split=train, dataset_test_split=test))
    if shared:
        with pytest.raises(InputError, match="share rows; hold rows out"):
            datasets_of(recipe, always_test=True)
    else:
        assert len(datasets_of(recipe, always_test=True)[1]) == 8
