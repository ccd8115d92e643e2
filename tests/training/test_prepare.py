"""The checkpoint a run starts from: made once, used again only while it is the same."""

import os
import shutil

import pytest
from runs import sft_rows
from safetensors.torch import load_file, save_file

from crrelu_llm.errors import InputError
from crrelu_llm.patching import PatchConfig
from crrelu_llm.training.prepare import starting_checkpoint

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
