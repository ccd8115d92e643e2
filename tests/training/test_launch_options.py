"""Launch options in a recipe or on the command line, as TRL's own recipes have them."""

import json

import pytest
from runs import losses

from crrelu_llm.cli.main import main
from crrelu_llm.errors import InputError
from crrelu_llm.training import launch
from crrelu_llm.training.arguments import parse


def test_a_recipe_with_launch_options_starts_itself_through_accelerate(workshop, monkeypatch, capfd):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):  # a training in this process leaves the second
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(workshop.folder / "accelerate"))
    argv = workshop.argv("sft", "launched", num_processes=1, accelerate_config="single_gpu")
    assert main(["sft", *argv, "--mixed_precision", "no", "--cpu"]) == 0
    assert capfd.readouterr().err.count("trained 3 steps") == 1
    record = json.loads((workshop.folder / "launched" / "run.json").read_text())
    assert losses(record) == losses(workshop.run("sft", "plain"))


@pytest.fixture
def launched(monkeypatch):
    """What Accelerate was asked to launch."""
    import accelerate.commands.launch as accelerate_launch

    calls = []
    monkeypatch.setattr(accelerate_launch, "launch_command", calls.append)
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_launch_options_go_to_accelerate_and_the_rest_to_the_recipe(workshop, launched):
    argv = workshop.argv("dpo", "unused", num_processes=4)
    options = ["--accelerate_config", "fsdp2", "--num_machines=2", "--multi_gpu", "--beta", "0.5"]
    assert main(["dpo", *argv, *options]) == 0
    (asked,) = launched
    assert (asked.num_processes, asked.num_machines, asked.multi_gpu) == (4, 2, True)
    assert asked.config_file.endswith("fsdp2.yaml")
    assert asked.module and asked.training_script == "crrelu_llm"
    assert asked.training_script_args == ["dpo", *argv, "--beta", "0.5"]


def test_a_launched_process_does_not_launch_again(workshop, launched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    argv = workshop.argv("sft", "inner", num_processes=4)
    assert launch.relaunch_if_asked(["sft"], argv, {"num_processes": 4}, set()) is None
    assert parse("sft", argv).values["num_processes"] == 4


def test_an_unknown_accelerate_config_is_one_line(workshop, launched):
    with pytest.raises(InputError, match="accelerate_config 'fsdp3' is neither a file nor one of ddp, fsdp2"):
        launch.relaunch_if_asked(["sft"], ["--accelerate_config", "fsdp3"], {}, set())
    assert not launched


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("num_processes: [1", "expected"),
        ("distributed_type: 'NO'\ncompute_environment: LOCAL_MACHINE\nno_such_key: 1\n", "no_such_key"),
        ("just words", ""),
    ],
)
def test_a_configuration_that_accelerate_cannot_read_is_named(tmp_path, text, reason):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"mine\.yaml is not a configuration of Accelerate") as error:
        launch.relaunch_if_asked(["sft"], [], {"accelerate_config": str(path)}, set())
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_what_accelerate_refuses_is_said_in_one_line(capfd):
    with pytest.raises(InputError, match=r"refuses --num_processes two: .*invalid int value: 'two'"):
        launch.relaunch_if_asked(["sft"], ["--num_processes", "two"], {}, set())
    assert capfd.readouterr().err == ""
