"""What is found before the long work, and what keeps a result from being wrong without a word."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from runs import LORA, dpo_rows, losses, sft_rows, write_rows
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoTokenizer

from crrelu_llm.errors import DiskError, InputError
from crrelu_llm.files import alone, sync
from crrelu_llm.patching import PatchConfig
from crrelu_llm.secrets import hidden_part, publishable, without_secrets
from crrelu_llm.training import preflight
from crrelu_llm.training.arguments import parse
from crrelu_llm.training.optimizer import check_learnable, epsilon_modules
from crrelu_llm.training.prepare import starting_checkpoint
from crrelu_llm.training.saving import learned_epsilons, require_saved

CONFIG = PatchConfig(calibration="none")


@pytest.fixture
def source(tiny_checkpoint, tmp_path):
    """A checkpoint of the test's own."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "source")


def _without_epsilon(optimizer, model, *rates):
    learned = {id(module.epsilon) for module in epsilon_modules(model).values()}
    for group in optimizer.param_groups:
        group["params"] = [value for value in group["params"] if id(value) not in learned]


class TestStaleCopies:
    """A patched copy is that of the files that are there now."""

    @pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "model.bin"])
    def test_another_file(self, source, tmp_path, name):
        made = starting_checkpoint(str(source), CONFIG, tmp_path / "out")
        before = os.stat(f"{made}/config.json").st_mtime_ns
        file = source / name
        file.write_text((file.read_text() if file.is_file() else "{}") + "\n")
        with pytest.raises(InputError, match=f"another patched checkpoint .*{name}"):
            starting_checkpoint(str(source), CONFIG, tmp_path / "out")
        assert starting_checkpoint(str(source), CONFIG, tmp_path / "out", renews=True) == made
        assert os.stat(f"{made}/config.json").st_mtime_ns != before

    def test_times_and_versions_alone_stop_no_resume(self, source, tmp_path, caplog):
        made = starting_checkpoint(str(source), CONFIG, tmp_path / "out")
        origin = json.loads((tmp_path / "out/patch_origin.json").read_text())
        (tmp_path / "out/patch_origin.json").write_text(json.dumps(origin | {"crrelu_llm": "0.0.1"}))
        os.utime(source / "model.safetensors")
        before = os.stat(f"{made}/config.json").st_mtime_ns
        assert starting_checkpoint(str(source), CONFIG, tmp_path / "out") == made
        assert "the version of crrelu_llm, model.safetensors changed, in time or version only" in caplog.text
        assert os.stat(f"{made}/config.json").st_mtime_ns == before
        starting_checkpoint(str(source), CONFIG, tmp_path / "out", renews=True)
        assert os.stat(f"{made}/config.json").st_mtime_ns != before

    def test_a_folder_of_calibration_text(self, source, tmp_path):
        folder = tmp_path / "text"
        write_rows(folder / "train.jsonl", sft_rows(200, words=20))
        config = PatchConfig(calibration_data=str(folder), calibration_tokens=512)
        starting_checkpoint(str(source), config, tmp_path / "out")
        write_rows(folder / "train.jsonl", sft_rows(201, words=20))
        with pytest.raises(InputError, match=r"train\.jsonl"):
            starting_checkpoint(str(source), config, tmp_path / "out")

    def test_other_options_are_never_made_anew(self, source, tmp_path):
        starting_checkpoint(str(source), CONFIG, tmp_path / "out")
        with pytest.raises(InputError, match="options"):
            other = PatchConfig(calibration="none", epsilon_init=0.5)
            starting_checkpoint(str(source), other, tmp_path / "out", renews=True)


class TestEpsilon:
    """An ε that is to be learned is learned, and saved."""

    def test_a_parent_in_modules_to_save(self, workshop):
        options = LORA | {
            "lora_modules_to_save": ["transformer.h.0.mlp"],
            "lora_target_modules": ["attn.c_attn", "attn.c_proj"],
        }
        record = workshop.run("sft", "run", **options, max_steps=4, epsilon_learning_rate=0.1)
        weights = load_file(workshop.folder / "run/adapter_model.safetensors")
        for path, value in record["epsilon"].items():
            assert value != record["epsilon_start"][path]
            assert weights[f"base_model.model.{path}.epsilon"].item() == pytest.approx(value, abs=1e-6)

        model = AutoPeftModelForCausalLM.from_pretrained(workshop.folder / "run")
        means = {path: module.epsilon.item() for path, module in epsilon_modules(model).items()}
        assert means == pytest.approx(record["epsilon"], abs=1e-6)

    def test_one_that_would_stay(self, workshop):
        _, trainer = workshop.trainer("sft", "run", **LORA)
        sites = list(epsilon_modules(trainer.model))
        check_learnable(trainer.model, sites)
        epsilon_modules(trainer.model)[sites[1]].epsilon.requires_grad_(False)
        with pytest.raises(InputError, match=f"1 sites would not be trained.*{sites[1]}"):
            check_learnable(trainer.model, sites)

    def test_one_that_no_gradient_reaches(self, workshop):
        _, trainer = workshop.trainer("sft", "run")
        for module in epsilon_modules(trainer.model).values():
            module.register_forward_hook(lambda module, args, output: output.detach())
        with pytest.raises(InputError, match="no gradient reaches it"):
            trainer.train()

    def test_one_that_the_optimiser_does_not_have(self, workshop, monkeypatch):
        _, trainer = workshop.trainer("sft", "run")
        monkeypatch.setattr("crrelu_llm.training.epsilon.split_off_epsilon", _without_epsilon)
        with pytest.raises(InputError, match="the optimiser does not have it"):
            trainer.train()

    def test_a_rate_too_small_to_show_stops_nothing(self, workshop):
        record = workshop.run("sft", "run", epsilon_learning_rate=1e-12, warmup_steps=2)
        assert record["steps"] == 3 and record["epsilon"] == record["epsilon_start"]

    def test_one_that_is_not_in_the_files(self, workshop):
        workshop.run("sft", "run")
        _, trainer = workshop.trainer("sft", "again")
        file = workshop.folder / "run/model.safetensors"
        weights = load_file(file)
        key = next(key for key in weights if key.endswith("epsilon"))
        with torch.no_grad():
            for path, module in epsilon_modules(trainer.model).items():
                module.epsilon.copy_(weights[f"{path}.epsilon"])
        learned = learned_epsilons(trainer.model)
        require_saved(file.parent, learned)
        for changed in (weights | {key: weights[key] + 1}, {name: weights[name] for name in weights if name != key}):
            save_file(changed, file, {"format": "pt"})
            with pytest.raises(RuntimeError, match="lacks the learned ε"):
                require_saved(file.parent, learned)


class TestRows:
    """Rows that are left out are counted; none is trained on that the model cannot read."""

    def test_rows_without_a_label_are_counted(self, workshop, caplog):
        long = [{"prompt": "the red cat " * 40, "completion": " walks"}]
        short = [{"prompt": "the cat", "completion": " walks"}]
        data = workshop.data("sft", train=short * 6 + long * 2, test=short)
        workshop.trainer("sft", "run", dataset_name=data, max_length=16)
        assert "2 of 8 rows of the train data are left out" in caplog.text

    def test_a_row_longer_than_the_table_of_positions(self, workshop):
        data = workshop.data("sft", train=sft_rows(4, words=300))
        with pytest.raises(InputError, match="128 positions; set max_length to 128"):
            workshop.trainer("sft", "run", dataset_name=data, max_length=None)

    def test_a_row_longer_than_rotary_positions(self, tiny_llama_checkpoint, workshop, caplog):
        data = workshop.data("sft", train=sft_rows(4, words=300))
        workshop.model = str(tiny_llama_checkpoint)
        workshop.trainer("sft", "run", dataset_name=data, max_length=None)
        assert "was not trained for longer rows" in caplog.text

    def test_the_prompt_of_ultrafeedback_is_read_once(self, workshop):
        rows = [
            {
                "prompt": row["prompt"],
                "chosen": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["chosen"]},
                ],
                "rejected": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "red"}],
            }
            for row in dpo_rows(8)
        ]
        plain = [{key: row[key] for key in ("chosen", "rejected")} for row in rows]
        data = {
            name: workshop.data("dpo", train=content, test=content)
            for name, content in (("own", rows), ("plain", plain))
        }
        records = [workshop.run("dpo", name, dataset_name=folder) for name, folder in data.items()]
        assert records[0]["history"][-1]["loss"] == records[1]["history"][-1]["loss"]

    def test_a_template_that_refuses_a_row(self, source, workshop):
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}x"
        tokenizer.save_pretrained(source)
        rows = [[{"role": "user", "content": "a"}], [{"role": "system", "content": "a"}]]
        rows = [{"messages": row} for row in rows]
        data = workshop.data("sft", train=rows, test=rows)
        with pytest.raises(InputError, match=r"row 2: .*no system role"):
            workshop.run("sft", "run", model_name_or_path=str(source), dataset_name=data, calibration="fit")
        assert not (workshop.folder / "run").exists()  # not even calibrated


def test_a_generation_config_that_cannot_be_saved(source, workshop):
    (source / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    for options in ({}, {"activation": None}):
        with pytest.raises(InputError, match=r"generation.config.* could not be saved"):
            workshop.run("sft", "run", model_name_or_path=str(source), **options)
    assert not list((workshop.folder / "run").glob("*.safetensors"))


def test_a_checkpoint_of_another_adapter(workshop):
    workshop.run("sft", "run", **LORA, save_strategy="steps", save_steps=2)
    with pytest.raises(InputError, match="checkpoint-2 is of another model or adapter"):
        checkpoint = str(workshop.folder / "run" / "checkpoint-2")
        workshop.run("sft", "run", **LORA | {"lora_r": 2}, max_steps=4, resume_from_checkpoint=checkpoint)


def test_a_disk_without_room_for_the_model(workshop, monkeypatch):
    usage = shutil.disk_usage(workshop.folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="making the checkpoint needs"):
        workshop.run("sft", "run", activation=None)


def test_a_tracker_that_is_not_installed(workshop):
    with pytest.raises(InputError, match="report_to wandb: pip install wandb"):
        workshop.run("sft", "run", report_to="wandb")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"input_ids": [3, 99999]}, "from 0 to 399"),
        ({"input_ids": ["a"]}, "from 0 to 399"),
        ({"input_ids": None}, "from 0 to 399"),
        ({"input_ids": [3, 4], "labels": [3]}, "2 input_ids, and 1 labels"),
    ],
)
def test_rows_that_are_tokenised_already(tokenizer, workshop, row, fault):
    recipe = parse("sft", workshop.argv("sft", "run"))
    preflight.check_rows(recipe, [{"input_ids": [3, 4], "labels": [3, -100]}], "rows", tokenizer)
    with pytest.raises(InputError, match=f"rows: row 2: .*{fault}"):
        preflight.check_rows(recipe, [{"input_ids": [3]}, row], "rows", tokenizer)


def test_wrapped_packing_leaves_nothing_out(workshop, caplog):
    workshop.trainer("sft", "run", packing=True, packing_strategy="wrapped")
    assert "left out" not in caplog.text


def test_a_prompt_beside_messages_is_in_them(workshop):
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "walks"}]
    data = workshop.data("sft", train=[{"prompt": "the cat", "messages": talk}] * 8, test=[{"messages": talk}])
    plain = workshop.data("sft", train=[{"messages": talk}] * 8, test=[{"messages": talk}])
    records = [workshop.run("sft", name, dataset_name=folder) for name, folder in (("run", data), ("plain", plain))]
    assert losses(records[0]) == losses(records[1])


def test_a_family_whose_files_have_other_names(workshop, tokenizer):
    model = tiny_model("mixtral", vocab_size=len(tokenizer))
    workshop.model = str(workshop.folder / "mixtral")
    model.save_pretrained(workshop.model)
    tokenizer.save_pretrained(workshop.model)
    record = workshop.run("sft", "run", max_steps=2)
    assert record["epsilon"] != record["epsilon_start"]


def test_dtype_auto_keeps_the_checkpoints(workshop):
    workshop.run("sft", "run", dtype="auto")
    weights = load_file(workshop.folder / "run/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_a_recipes_variables_start_no_launcher(workshop, monkeypatch):
    monkeypatch.delenv("CRRELU_TEST", raising=False)
    from crrelu_llm.training.launch import launch_keys

    assert "env" not in launch_keys()
    workshop.run("sft", "run", env={"CRRELU_TEST": 1})
    assert os.environ.pop("CRRELU_TEST") == "1"


@pytest.mark.needs("tensorboard")
def test_a_planted_secret_is_in_no_file(workshop, capfd):
    secret = "hf_planted0secret"
    workshop.run(
        "sft",
        "run",
        env={"CRRELU_PLANTED": secret},
        hub_token=secret,
        model_init_kwargs={"token": secret, "use_cache": False},
        save_strategy="steps",
        save_steps=1,
        report_to="tensorboard",
    )
    os.environ.pop("CRRELU_PLANTED")
    out, err = capfd.readouterr()
    assert secret not in out + err
    files = [path for path in (workshop.folder / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert json.loads((workshop.folder / "run/run.json").read_text())["recipe"]["env"] == {"CRRELU_PLANTED": "…"}


def test_what_may_be_published():
    secret = "hf_planted0secret"
    text = json.dumps({"token": secret, "dtype": "float32"})
    values = {
        "model_init_kwargs": text,
        "learning_rate": 1e-4,
        "dataset_name": f"https://me:{secret}@host/x?token={secret}",
    }
    assert secret not in json.dumps(publishable(values))
    assert secret not in json.dumps(publishable({"model_init_kwargs": {"headers": {"path": secret}}}))
    assert json.loads(publishable(values)["model_init_kwargs"]) == {"token": "…", "dtype": "float32"}
    argv = [
        "sft",
        "--model_init_kwargs",
        text,
        f"--model_init_kwargs={text}",
        "--hub_token",
        secret,
        f"--hub_token={secret}",
    ]
    assert secret not in " ".join(without_secrets(argv))
    assert without_secrets(["--max_steps", "3"]) == ["--max_steps", "3"]
    hidden = [hidden_part({"model_init_kwargs": {"rope_type": kind, "token": kind}}) for kind in ("yarn", "linear")]
    assert None not in hidden and hidden[0] != hidden[1]
    assert hidden_part({"model_init_kwargs": {"token": "a"}}) == hidden_part({"model_init_kwargs": {"token": "b"}})
    assert hidden_part({"max_steps": 3}) is None


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_follow_the_umask(workshop, mask):
    before = os.umask(mask)
    try:
        workshop.run("sft", "run", save_strategy="steps", save_steps=3)
    finally:
        os.umask(before)
    files = [path for path in (workshop.folder / "run").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


class TestAlone:
    """Two commands do not work in one directory."""

    def test_one_at_a_time(self, tmp_path):
        place = tmp_path / "a" / "b"
        with (
            alone(place, "crrelu sft"),
            pytest.raises(InputError, match="another `crrelu sft` is at work"),
            alone(place, "crrelu sft"),
        ):
            pass
        assert not (tmp_path / "a").exists()  # nothing came into it
        with alone(place, "crrelu sft"):
            (place / "run.json").write_text("{}")
        assert [path.name for path in place.iterdir()] == ["run.json"]

    def test_by_another_name(self, tmp_path, monkeypatch):
        (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
        monkeypatch.chdir(tmp_path)
        for other in (Path("."), tmp_path / "link"):
            with (
                alone(tmp_path, "crrelu report", ".report.lock"),
                pytest.raises(InputError, match="at work"),
                alone(other, "crrelu report", ".report.lock"),
            ):
                pass

    def test_a_run(self, workshop):
        with (
            alone(workshop.folder / "run", "crrelu sft"),
            pytest.raises(InputError, match="another `crrelu sft` is at work"),
        ):
            workshop.run("sft", "run")

    def test_a_directory_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises((InputError, DiskError)), alone(tmp_path / "file" / "run", "crrelu sft"):
            pass


def test_sync_leaves_other_modes_alone(tmp_path):
    for name, mode in (("shared", 0o640), ("own", 0o600)):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(mode)
    sync(tmp_path)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) != 0o600


def test_a_mixture_names_its_fault(workshop):
    with pytest.raises(InputError, match=r"datasets: .*; check their paths"):
        workshop.run("sft", "run", dataset_name=None, datasets=[{"path": "json", "data_files": "nowhere.jsonl"}])


def test_check_rows_of_a_stream_looks_at_the_first(tokenizer, workshop):
    from datasets import Dataset

    recipe = parse("sft", workshop.argv("sft", "run"))
    rows = Dataset.from_list([{"text": "a"}] * 200 + [{"text": None}]).to_iterable_dataset()
    preflight.check_rows(recipe, rows, "rows", tokenizer)
    with pytest.raises(InputError, match="rows: row 201"):
        preflight.check_rows(recipe, list(rows), "rows", tokenizer)
