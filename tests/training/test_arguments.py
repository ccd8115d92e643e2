"""Recipes: TRL's keys and ours parse; every mistake is one line that names the file, and nothing is written."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from runs import write_recipe
from trl import DPOConfig, SFTConfig

from crrelu_llm.cli.main import _underscores
from crrelu_llm.errors import InputError
from crrelu_llm.training.arguments import make_parser, parse
from crrelu_llm.training.run import run_recipe

NEEDED = {
    "model_name_or_path": "some/model",
    "dataset_name": "some/data",
    "output_dir": "out",
    "use_cpu": True,
    "activation": "crrelu",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mistake(folder):
    """The message for a recipe with these values (None takes a needed key away), and proof that it is one line."""

    def message(*argv, kind="sft", **values):
        content = {key: value for key, value in (NEEDED | values).items() if value is not None}
        path = write_recipe(folder / "my.yaml", content)
        with pytest.raises(InputError) as caught:
            run_recipe(kind, ["--config", path, *argv])
        text = str(caught.value)
        assert len(text.splitlines()) == 1
        assert path in text
        assert [entry.name for entry in folder.iterdir()] == ["my.yaml"]
        return text.removeprefix(f"{path}: ")

    return message


def test_every_key_of_trl_is_known():
    for kind, config in (("sft", SFTConfig), ("dpo", DPOConfig)):
        known = {action.dest for action in make_parser(kind)._actions}
        assert {name for name, field in config.__dataclass_fields__.items() if field.init} <= known
        assert {"lora_r", "load_in_4bit", "dataset_train_split", "datasets", "epsilon_learning_rate"} <= known


def test_a_recipe_of_trl_parses_unchanged(folder, monkeypatch):
    monkeypatch.setenv("CRRELU_LLM_TEST", "0")
    values = NEEDED | {
        "activation": None,
        "learning_rate": "2.0e-5",  # as YAML reads 2e-5, a string
        "lora_target_modules": ["c_attn", "c_fc"],
        "use_peft": True,
        "eval_strategy": "steps",
        "eval_steps": 0.5,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.5],
        "report_to": ["none"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "env": {"CRRELU_LLM_TEST": "1"},
    }
    recipe = parse("dpo", ["--config", write_recipe(folder / "r.yaml", values)])
    assert recipe.training.learning_rate == 2e-5
    assert recipe.training.loss_type == ["sigmoid", "sft"]
    assert recipe.model.lora_target_modules == ["c_attn", "c_fc"]
    assert recipe.activation.patch_config() is None
    assert recipe.values["eval_steps"] == 0.5
    assert os.environ["CRRELU_LLM_TEST"] == "1"


def test_the_command_line_wins_over_the_file(folder):
    path = write_recipe(folder / "r.yaml", NEEDED | {"learning_rate": 0.1, "seed": 3})
    argv = _underscores(["--config", path, "--learning-rate", "0.2", "--epsilon-per=channel", "--packing", "true"])
    recipe = parse("sft", argv)
    assert (recipe.training.learning_rate, recipe.training.seed, recipe.training.packing) == (0.2, 3, True)
    assert recipe.activation.patch_config().epsilon_per == "channel"
    given = {"learning_rate": 0.2, "epsilon_per": "channel", "packing": True}
    assert recipe.values == NEEDED | {"seed": 3} | given


def test_null_on_the_command_line_unsets_the_activation_of_a_recipe(folder):
    write_recipe(folder / "my.yaml", NEEDED)
    assert parse("sft", ["--config", "my.yaml"]).activation.patch_config() is not None
    assert parse("sft", ["--config", "my.yaml", "--activation", "null"]).activation.patch_config() is None


def test_the_command_line_alone_is_enough(folder):
    argv = [part for key, value in NEEDED.items() for part in (f"--{key}", str(value))]
    assert parse("sft", argv).values == NEEDED


def test_a_misspelt_key_gets_a_suggestion(mistake):
    assert mistake(learning_rat=1) == "unknown key 'learning_rat' (did you mean 'learning_rate'?)"
    assert mistake(epsilom_per="layer") == "unknown key 'epsilom_per' (did you mean 'epsilon_per'?)"
    assert mistake(zzz=1) == "unknown key 'zzz'"


@pytest.mark.parametrize("option", ["--learning_rat", "--lerning_rate"])  # also where an abbreviation would do
def test_a_misspelt_option_gets_a_suggestion(folder, option):
    path = write_recipe(folder / "r.yaml", NEEDED)
    with pytest.raises(InputError) as caught:
        parse("sft", ["--config", path, option, "3"])
    assert str(caught.value) == f"unknown option {option} (did you mean --learning_rate?)"


def test_several_problems_are_one_line(mistake):
    text = mistake(learning_rat=1, learning_rate="fast", max_steps=1.5)
    assert text.count(";") == 2
    for part in ("'learning_rat'", "learning_rate must be a number, not 'fast'", "max_steps must be a number (whole)"):
        assert part in text


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": "fast"},
        {"max_steps": 1.5},
        {"max_steps": "many"},
        {"learning_rate": [1, 2]},
        {"seed": {"a": 1}},
        {"seed": True},
        {"seed": float("inf")},
        {"model_name_or_path": ["a", "b"]},
        {"eval_strategy": "sometimes"},
        {"lr_scheduler_type": "nope"},
        {"packing": "perhaps"},
        {"epsilon_init": "small"},
        {"epsilon_learning_rate": -1},
        {"epsilon_weight_decay": -0.1},
        {"calibration": "guess"},
        {"calibration_tokens": 0},
    ],
    ids=str,
)
def test_wrong_values_are_named(mistake, values):
    ((key, value),) = values.items()
    text = mistake(**values)
    assert key in text
    assert str(value) in text


def test_wrong_values_on_the_command_line_are_named(mistake):
    assert "--max_steps" in (text := mistake("--max_steps", "1.5")) and "'1.5'" in text
    assert "--seed" in mistake("--seed")


def test_epsilon_per(mistake):
    assert mistake(epsilon_per="neuron") == 'epsilon_per must be "layer" or "channel", not "neuron"'
    assert mistake(activation=None, epsilon_per="neuron") == 'epsilon_per must be "layer" or "channel", not "neuron"'


def test_unknown_activation(mistake):
    assert mistake(activation="crelu").startswith("unknown activation 'crelu'; choose one of crrelu, ")
    assert "leave activation out (--activation null)" in mistake(activation="native")


def test_model_and_data_are_needed(mistake):
    assert mistake(model_name_or_path=None).startswith("model_name_or_path is missing")
    assert mistake(dataset_name=None).startswith("dataset_name is missing")


def test_trls_own_checks_are_one_line(mistake):
    assert "--load_best_model_at_end requires" in mistake(load_best_model_at_end=True)


def test_bf16_without_an_accelerator(mistake, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    assert "use_cpu" in (text := mistake(bf16=True, use_cpu=None)) and "bf16" in text


def test_files_that_are_no_recipes(folder):
    for name, content, message in (
        ("broken.yaml", "a: [1, 2\nb: 3", "broken.yaml: not valid YAML"),
        ("list.yaml", "- 1\n- 2\n", "list.yaml: a recipe is a list of `key: value` lines"),
        ("empty.yaml", "", "empty.yaml: a recipe is"),
    ):
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            parse("sft", ["--config", name])
        assert "\n" not in str(caught.value)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid YAML"):
        parse("sft", ["--config", "binary.yaml"])
    with pytest.raises(InputError, match=r"no such recipe: absent\.yaml"):
        parse("sft", ["--config", "absent.yaml"])
    with pytest.raises(InputError, match="--config needs a file"):
        parse("sft", ["--config"])


def test_output_dir_is_a_file(folder):
    (folder / "out").write_text("kept")
    path = write_recipe(folder / "r.yaml", NEEDED)
    with pytest.raises(InputError, match="output_dir out is a file"):
        run_recipe("sft", ["--config", path])
    assert (folder / "out").read_text() == "kept"


@pytest.mark.slow  # in one process: end_to_end/test_wrong_inputs.py
def test_the_command_prints_one_line_and_exits_with_2(folder):
    values = NEEDED | {"epsilon_per": "neuron", "gradient_checkpointing": True}
    (folder / "r.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "crrelu_llm", "sft", "--config", "r.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == 'crrelu sft: r.yaml: epsilon_per must be "layer" or "channel", not "neuron"\n'
    assert [entry.name for entry in folder.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_a_batch_of_nothing_is_refused(workshop, key):
    with pytest.raises(InputError, match=f"{key} must be 1 or more, not 0"):
        parse("sft", workshop.argv("sft", "unused", **{key: 0}))


def test_a_missing_model_is_named_before_anything_else():
    with pytest.raises(InputError, match=r"^model_name_or_path is missing"):
        parse("sft", ["--max_steps", "3"])  # without use_cpu, a CPU would refuse bf16 first


def test_an_unknown_tracker_is_refused(workshop):
    with pytest.raises(InputError, match="report_to: unknown tracker 'nothere'"):
        parse("sft", workshop.argv("sft", "unused", report_to=["nothere"]))
