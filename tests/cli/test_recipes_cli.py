"""`crrelu recipes`, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crrelu_llm.cli import main as command_line
from crrelu_llm.recipes_path import recipes_dir

NAME = "smollm2-135m/dpo/config_lora"


def crrelu(*argv: str) -> int:
    return command_line.main(["recipes", *argv])


def test_list_prints_every_recipe_with_its_first_line(capsys):
    assert crrelu("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(recipes_dir().rglob("*.yaml")))
    (line,) = [line for line in lines if line.split()[0] == NAME]
    assert line.endswith("SmolLM2-135M-Instruct, DPO, LoRA: trl-lib/ultrafeedback_binarized")


def test_list_json_names_files_that_exist(capsys):
    assert crrelu("list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"accelerate_configs/fsdp2", "gpt2/dpo/config_full", NAME} <= {row["name"] for row in rows}
    assert all(Path(row["path"]).is_file() and row["summary"] for row in rows)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yaml", "accelerate_configs/zero3"])
def test_show_prints_the_file(name, capsys):
    assert crrelu("show", name) == 0
    assert capsys.readouterr().out == (recipes_dir() / f"{name.removesuffix('.yaml')}.yaml").read_text()


def test_copy_to_a_new_file_and_into_a_folder(tmp_path, capsys):
    original = (recipes_dir() / f"{NAME}.yaml").read_text()
    assert crrelu("copy", NAME, str(tmp_path / "new" / "my.yaml")) == 0
    assert crrelu("copy", NAME, str(tmp_path)) == 0
    assert (tmp_path / "new" / "my.yaml").read_text() == (tmp_path / "config_lora.yaml").read_text() == original
    assert str(tmp_path / "config_lora.yaml") in capsys.readouterr().out


def test_copy_never_overwrites(tmp_path, capsys):
    mine = tmp_path / "my.yaml"
    mine.write_text("mine")
    assert crrelu("copy", NAME, str(mine)) == 2
    assert mine.read_text() == "mine"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "my.yaml already exists" in error


def test_copy_to_an_impossible_place_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert crrelu("copy", NAME, str(tmp_path / "file" / "my.yaml")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_name_gets_close_matches(capsys):
    assert crrelu("show", "smollm2-135m/dpo/config_lra") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'smollm2-135m/dpo/config_lra'" in error and NAME in error


@pytest.mark.parametrize("name", ["../pyproject.toml", "README.md", ""])
def test_only_recipes_are_shown(name, capsys):
    assert crrelu("show", name) == 2
    assert capsys.readouterr().out == ""


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from crrelu_llm.cli.main import main; main(['recipes', 'list']); "
        "sys.exit(str({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)) if "
        "{'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
