"""`crrelu plan` as a user runs it."""

import json
import shlex

import pytest
from families import family_config
from tiny import tiny_config, tiny_model

from crrelu_llm import patch
from crrelu_llm.cli import main as command_line
from crrelu_llm.planning import spread

SMALL = ("--per_device_train_batch_size", "2", "--max_length", "32")


def plan(*argv):
    return command_line.main(["plan", *map(str, argv)])


def document(capsys, *argv):
    assert plan(*argv, *SMALL, "--json") == 0
    return json.loads(capsys.readouterr().out)


_PLAYED = {}


@pytest.fixture(autouse=True)
def each_step_once(monkeypatch):
    """A step of one model and job, which takes a second to play, is played once for all tests of this file."""
    play = spread.play

    def once(config, *job):
        model = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        key = (json.dumps(model, sort_keys=True, default=str), *job)
        if key not in _PLAYED:
            _PLAYED[key] = play(config, *job)
        return _PLAYED[key]

    monkeypatch.setattr(spread, "play", once)


@pytest.fixture
def config(tmp_path):
    """A bare config.json."""
    path = tmp_path / "config.json"
    tiny_config("llama").to_json_file(path)
    return path


def test_json_from_a_bare_config(config, capsys):
    found = document(capsys, config, "--gpus", 8)
    assert list(config.parent.iterdir()) == [config]
    assert set(found) == {
        "model", "model_type", "parameters", "job", "gpus", "gpus_per_node", "gpu_memory", "configs", "recommended",
        "command", "activations", "host", "counted",
    }  # fmt: skip
    counted = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert found["parameters"] == {"total": counted + 2, "trainable": counted + 2, "epsilon": 2}
    assert [row["config"] for row in found["configs"]] == ["ddp", "fsdp2", "zero2", "zero3"]
    assert all(row["fits"] for row in found["configs"]) and found["recommended"] == "ddp"
    assert document(capsys, config.parent, "--gpus", 8)["configs"] == found["configs"]  # its directory


def test_the_table_says_what_the_json_says(config, capsys):
    found = document(capsys, config, "--gpus", 8, "--gpu_memory", 0.5)
    assert plan(config, *SMALL, "--gpus", 8, "--gpu_memory", 0.5) == 0
    text = capsys.readouterr().out
    for row in found["configs"]:
        (line,) = [line.split() for line in text.splitlines() if line.split()[:1] == [row["config"]]]
        sizes = [row[key] for key in ("weights", "gradients", "optimizer", "activations", "buffers", "total")]
        assert line[1:-1] == [f"{size / 2**30:.2f}" for size in sizes]
        assert line[-1] == ("yes" if row["fits"] else "no")
    assert {row["config"]: row["fits"] for row in found["configs"]} == {
        "ddp": True, "fsdp2": True, "zero2": False, "zero3": False,  # DeepSpeed's bucket alone takes a GB
    }  # fmt: skip
    assert found["counted"] in text and found["command"] in text and "llama: " in text


def test_the_command_starts_the_job_that_was_planned(config, capsys):
    options = ("--trainer", "dpo", "--gradient_checkpointing", "false", "--recompute_activation", "--gpus", "16")
    found = document(capsys, config, *options)
    words = shlex.split(found["command"])
    assert words[:4] == ["accelerate", "launch", "--config_file", "recipes/accelerate_configs/ddp.yaml"]
    assert words[words.index("--num_processes") + 1] == "16" and words[words.index("--num_machines") + 1] == "2"
    ours = words[words.index("crrelu_llm") + 1 :]
    assert ours[:3] == ["dpo", "--config", "R.yaml"]
    from crrelu_llm.training.arguments import make_parser

    argv = [*ours[3:], "--model_name_or_path", "x", "--output_dir", "x", "--bf16", "false", "--use_cpu", "true"]
    _, training, _, _, activation = make_parser("dpo").parse_args_into_dataclasses(argv)
    assert (training.gradient_checkpointing, activation.recompute_activation) == (False, True)
    assert (training.per_device_train_batch_size, training.max_length) == (2, 32)


def test_nothing_fits(config, capsys):
    assert plan(config, *SMALL, "--gpus", 8, "--gpu_memory", "0.001") == 0
    assert "nothing fits" in capsys.readouterr().out
    found = document(capsys, config, "--gpus", 8, "--gpu_memory", "0.001")
    assert (found["recommended"], found["command"]) == (None, None)


def test_the_built_in_model_and_a_patched_one(tmp_path, capsys):
    nano = document(capsys, "builtin:nano")
    assert (nano["model_type"], nano["recommended"]) == ("gpt2", "single_gpu")
    model = tiny_model("llama")
    patch(model, epsilon_per="channel", calibration="none")
    model.config.save_pretrained(tmp_path)
    assert document(capsys, tmp_path)["parameters"]["epsilon"] == 2 * 48
    assert plan(tmp_path, *SMALL, "--activation", "gelu") == 2
    assert "already patched to crrelu" in capsys.readouterr().err


def test_more_weights_than_a_test_machine_holds(tmp_path, capsys):
    sizes = {"hidden_size": 32768, "intermediate_size": 65536, "num_hidden_layers": 2, "num_attention_heads": 256}
    tiny_config("llama", **sizes, num_key_value_heads=256).to_json_file(tmp_path / "config.json")
    found = document(capsys, tmp_path, "--gpus", 64)
    (fsdp2,) = [row for row in found["configs"] if row["config"] == "multi_node"]
    assert found["parameters"]["total"] > 2e10 and fsdp2["weights"] * 64 >= 4 * found["parameters"]["total"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpus", "0"), "gpus and gpus_per_node must be 1 or more, not 0 and 8"),
        (("--gpus", "12"), "12 GPUs do not fill whole nodes with 8 each"),
        (("--gpus", "x"), "invalid int value: 'x'"),
        (("--gpu_memory", "0"), "gpu_memory must be more than 0 GiB"),
        (("--gpu_memory", "nan"), "gpu_memory must be more than 0 GiB"),
        (("--max_length", "1000"), "max_length 1000: the model takes at most 128 tokens"),
        (("--max_length", "0"), "max_length must be 1 or more, not 0"),
        (("--per_device_train_batch_size", "-1"), "per_device_train_batch_size must be 1 or more, not -1"),
        (("--activation", "swisch"), "unknown activation 'swisch'"),
        (("--activation", "gelu", "--recompute_activation"), "recompute_activation is for CRReLU"),
        (("--load_in_4bit",), "add --use_peft"),
        (("--precompute_ref_log_probs",), "add --trainer dpo"),
        (("--use_cpu", "--gpus", "2"), "use_cpu plans for one process"),
        (("--trainer", "ppo"), "invalid choice: 'ppo'"),
        (("--bf16", "perhaps"), "perhaps"),
        (("--gpu", "8"), "unrecognized arguments: --gpu 8"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_one_line(options, words, config, capsys):
    assert plan(config, *SMALL, *options) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("crrelu plan: ") and words in printed.err


def test_models_that_cannot_be_planned(tmp_path, capsys):
    family_config("xlm").to_json_file(tmp_path / "xlm.json")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "unknown.json").write_text('{"model_type": "no_such_family"}')
    for model, words in {
        # "gradient" or "activation": the words of the release
        tmp_path / "xlm.json": "checkpointing. Add --gradient_checkpointing false",
        tmp_path / "broken.json": "not the config of a model",
        tmp_path / "unknown.json": "not the config of a model",
        tmp_path / "missing.json": "no such file",
        "nobody/no-such-model": "nobody/no-such-model",
        "builtin:giant": "builtin:nano",
    }.items():
        assert plan(model, *SMALL) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1, printed.err
        assert words in printed.err


def test_nothing_fits_on_a_cpu(capsys):
    assert plan("builtin:nano", "--use_cpu", "--bf16", "false", "--max_length", "64", "--gpu_memory", "0.001") == 0
    assert "nothing fits: take a machine with more memory" in capsys.readouterr().out
