"""Wrong inputs of every command, at scale: status 2, at most three lines, the culprit by name, nothing left behind."""

import gzip
import json
import shutil

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import BASE, write_rows
from safetensors.torch import load_file, save_file

from crrelu_llm.cli.main import main

U, A = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "walks over"}
SFT_ROWS = [{"text": "the red cat walks over the stone"}] * 8
DPO_ROWS = [{"prompt": "the cat", "chosen": " walks", "rejected": " sees"}] * 8

# Recipe keys and values that no run can have, and the word that must be in the line.
WRONG_VALUES = [
    *[("activation", value) for value in ("crelu", "GELU", "sigmoid2", "", 7)],
    *[("calibration", value) for value in ("reconstruct", "full", "Fit", 3)],
    *[("calibration_tokens", value) for value in (-1, 0, "many", 2.5, [512])],
    *[("calibration_data", value) for value in ("builtin:novels", "./nowhere.jsonl", "/nowhere", "a/b/c")],
    *[("epsilon_per", value) for value in ("site", "head", 1)],
    *[("epsilon_init", value) for value in ("small", float("nan"), float("inf"), [0.1])],
    *[("epsilon_learning_rate", value) for value in (-1e-3, "fast", float("inf"), float("nan"))],
    *[("epsilon_weight_decay", value) for value in (-0.1, "none")],
    *[("affine_learning_rate", value) for value in (-1, "x", 1e-3)],
    *[("density", value) for value in ("uniform", "Fitted")],
    *[("density_momentum", value) for value in (1.0, -0.1)],
    *[("density_update_steps", value) for value in (-1, 2)],
    *[("blend_steps", value) for value in (-1, "some", 100)],
    *[("blend_schedule", value) for value in ("sine",)],
    *[("distill_weight", value) for value in (-1, "a")],
    *[("max_steps", value) for value in ("ten", 1.5, [3])],
    *[("max_length", value) for value in ("long", {"a": 1})],
    *[("learning_rate", value) for value in ("quick", [1e-4])],
    *[("per_device_train_batch_size", value) for value in (0, -2, "two")],
    *[("per_device_eval_batch_size", value) for value in (0, 1.5)],
    *[("gradient_accumulation_steps", value) for value in (0, "x")],
    *[("lr_scheduler_type", value) for value in ("cosinus", 4)],
    *[("optim", value) for value in ("adam_w", "adamw_8bits", "galore_adamw", "schedule_free_adamw", "lomo")],
    *[("report_to", value) for value in ("wand", "tensorbord", "wandb", "mlflow", "comet_ml")],
    *[("save_strategy", value) for value in ("sometimes",)],
    *[("eval_strategy", value) for value in ("often",)],
    *[("seed", value) for value in ("zero", 1.5)],
    *[("packing_strategy", value) for value in ("tight",)],
    *[("truncation_mode", value) for value in ("keep_middle",)],
    *[("resume_from_checkpoint", value) for value in ("nowhere/checkpoint-3", True)],
    *[("dtype", value) for value in ("float8", "int8")],
    *[("attn_implementation", value) for value in ("flash_attention_2", "fast")],
    *[("use_liger_kernel", True)],
    *[("load_in_4bit", value) for value in ("perhaps",)],
    *[("lora_r", value) for value in ("eight",)],
    *[("dataset_name", value) for value in (None, "builtin:dogs", "./nowhere", "/nowhere/data.jsonl")],
    *[("dataset_train_split", value) for value in ("training",)],
    *[("chat_template_path", value) for value in ("./nowhere.jinja", "./nowhere")],
    *[("model_name_or_path", value) for value in (None, "./nowhere", "/nowhere", "builtin:giant", "a/b/c", "x.gguf")],
    *[("accelerate_config", value) for value in ("ddp9", "./nowhere.yaml")],
    *[("env", value) for value in ("X", ["X"])],
    *[("datasets", value) for value in (["x"], [{"path": "json", "data_files": "./nowhere.jsonl"}], [{"nopath": 1}])],
    *[("bf16", "maybe")],
    *[("gradient_checkpointing", "x"), ("recompute_activation", "x")],
    *[
        ("activations", "gelu"),
        ("learningrate", 1e-4),
        ("epsilon_lr", 1e-3),
        ("calibration_set", "x"),
        ("lora_rank", 8),
    ],
    *[("push_to_hub", True)],
]

WRONG_ROWS = {
    "null": [*SFT_ROWS, {"text": None}],
    "number": [{"text": index} for index in range(8)],
    "list": [{"text": ["a", "b"]}] * 4,
    "no-column": [{"words": "a"}] * 4,
    "empty-messages": [{"messages": [U, A]}] * 3 + [{"messages": []}],
    "null-message": [{"messages": [U, A]}] * 3 + [{"messages": None}],
    "no-content": [{"messages": [U, {"role": "assistant", "content": None}]}] * 3,
    "no-role": [{"messages": [{"content": "a"}]}] * 3,
    "messages-of-texts": [{"messages": ["a", "b"]}] * 3,
    "prompt-alone": [{"prompt": "a"}] * 3,
    "completion-null": [{"prompt": "a", "completion": None}] * 3,
    "mixed-sides": [{"prompt": [U], "completion": "walks"}] * 3,
    "masked": [{"prompt": "the red cat walks over the stone " * 20, "completion": " a"}] * 4,
}
WRONG_PAIRS = {
    "no-rejected": [{"prompt": "a", "chosen": "b"}] * 4,
    "null-chosen": [*DPO_ROWS, {"prompt": "a", "chosen": None, "rejected": "b"}],
    "numbers": [{"prompt": "a", "chosen": 1, "rejected": 2}] * 4,
    "empty-side": [{"prompt": [U], "chosen": [], "rejected": [A]}] * 4,
    "one-talks": [{"prompt": "a", "chosen": [A], "rejected": "b"}] * 4,
}


def _config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _weights(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _not_finite(weights):
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = torch.nan


def _larger_tokenizer(directory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(directory)


def _section(directory, **section):
    _config(directory, crrelu=section)


# What is done to a copy of a tiny GPT-2.
WRONG_MODELS = {
    "no-config": lambda d: (d / "config.json").unlink(),
    "config-not-json": lambda d: (d / "config.json").write_text("{"),
    "config-a-list": lambda d: (d / "config.json").write_text("[]"),
    "config-no-type": lambda d: (d / "config.json").write_text("{}"),
    "config-unknown-type": lambda d: _config(d, model_type="gpt9"),
    "config-encoder-decoder": lambda d: (d / "config.json").write_text('{"model_type": "t5"}'),
    "config-width": lambda d: _config(d, n_embd=64),
    "config-vocabulary": lambda d: _config(d, vocab_size=999),
    "config-heads": lambda d: _config(d, n_head=7),
    "config-activation": lambda d: _config(d, activation_function="gelu9"),
    "weights-cut": _truncate,
    "weights-empty": lambda d: (d / "model.safetensors").write_bytes(b""),
    "weights-missing": lambda d: (d / "model.safetensors").unlink(),
    "weights-nan": lambda d: _weights(d, _not_finite),
    "tokenizer-missing": lambda d: [(d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
    "tokenizer-broken": lambda d: (d / "tokenizer.json").write_text("{"),
    "tokenizer-larger": _larger_tokenizer,
    "generation-config": lambda d: (d / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": false}'
    ),
    "section-newer": lambda d: _section(d, version=99),
    "section-text": lambda d: _section(d, version="1"),
    "section-incomplete": lambda d: _section(d, version=1, activation="crrelu"),
}
# Those that a command does not look at, or can use: a model without weights can be inspected, …
_WEIGHTS = {"weights-cut", "weights-empty", "weights-missing", "weights-nan", "config-width", "config-vocabulary"}
_TOKENIZER = {"tokenizer-missing", "tokenizer-broken", "tokenizer-larger", "generation-config"}
LOOKS_AT = {
    "inspect": WRONG_MODELS.keys() - _WEIGHTS - _TOKENIZER,
    "patch": WRONG_MODELS.keys(),
    "sft": WRONG_MODELS.keys(),
}

WRONG_OPTIONS = [
    ["patch"],
    ["patch", "builtin:nano"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--activation", "crelu"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--calibration", "best"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--calibration_tokens", "0"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--calibration_tokens", "many"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--calibration_data", "/nowhere"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--perplexity_data", "/nowhere"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--perplexity_tokens", "1"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--dtype", "float8"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--epsilon_per", "head"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--epsilon_init", "tiny"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--density", "uniform"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--activation", "gelu", "--density", "fitted"],
    ["patch", "builtin:nano", "--output_dir", "OUT", "--colour"],
    ["patch", "builtin:nano", "--output_dir", "FILE"],
    ["patch", "builtin:nano", "--output_dir", "FULL"],
    ["inspect"],
    ["inspect", "builtin:tiny"],
    ["inspect", "/nowhere"],
    ["inspect", "builtin:nano", "--verbose"],
    ["sft", "--config", "/nowhere.yaml"],
    ["sft", "--config"],
    ["sft", "--config=x.yaml"],
    ["sft", "--model_name_or_path", "builtin:nano"],
    ["dpo", "--config", "/nowhere.yaml"],
    ["compare", "sft"],
    ["compare", "ppo", "--config", "x", "--arms", "gelu", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "/nowhere.yaml", "--arms", "gelu", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "crelu", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu", "gelu", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu:speed=1", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu:calibration", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu", "--seeds", "-1", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu", "--seeds", "1", "1", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu", "--seeds", "a", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu", "--baseline", "relu", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu", "--grid", "seed=1,2", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu", "--grid", "beta", "--output_dir", "OUT"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu", "--output_dir", "FILE"],
    ["compare", "sft", "--config", "RECIPE", "--arms", "gelu", "--output_dir", "FULL"],
    ["eval"],
    ["eval", "--models", "builtin:nano", "--suite", "everything", "--output_dir", "OUT"],
    ["eval", "--models", "a=/nowhere", "--suite", "preference", "--data", "PAIRS", "--output_dir", "OUT"],
    ["eval", "--models", "a=", "--suite", "preference", "--data", "PAIRS", "--output_dir", "OUT"],
    ["eval", "--models", "a/b=builtin:nano", "--suite", "preference", "--data", "PAIRS", "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "a=builtin:nano", "--suite", "preference", "--data", "PAIRS",
     "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--data", "/nowhere", "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--data", "ROWS", "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "local", "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "local", "--data_dir", "/nowhere", "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "local", "--tasks", "chess", "--data_dir", "DIR",
     "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--data", "PAIRS", "--limit", "0",
     "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--data", "PAIRS", "--beta", "-1",
     "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--data", "PAIRS", "--baseline", "b",
     "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--data", "PAIRS", "--reference", "b",
     "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--data", "PAIRS", "--batch_size", "x",
     "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--data", "PAIRS", "--device", "tpu",
     "--output_dir", "OUT"],
    ["eval", "--models", "a=builtin:nano", "--suite", "preference", "--data", "PAIRS", "--output_dir", "FILE"],
    ["report"],
    ["report", "/nowhere"],
    ["report", "DIR"],
    ["report", "DIR", "--margin", "loss"],
    ["report", "DIR", "--margin", "loss=-1"],
    ["report", "DIR", "--format", "pdf"],
    ["card"],
    ["card", "/nowhere"],
    ["card", "DIR"],
    ["bench"],
    ["bench", "gpu"],
    ["bench", "op", "--shapes", "4x"],
    ["bench", "op", "--shapes", "0x3"],
    ["bench", "op", "--dtypes", "int8"],
    ["bench", "op", "--repeats", "0"],
    ["bench", "op", "--device", "cuda"],
    ["bench", "mlp", "--layers", "0"],
    ["bench", "train"],
    ["bench", "train", "/nowhere"],
    ["eafo"],
    ["eafo", "derive", "--activation", "swish9"],
    ["eafo", "derive", "--density", "x**"],
    ["eafo", "fit", "/nowhere", "--output_dir", "OUT"],
    ["eafo", "rank", "builtin:nano", "--activations", "swish9", "--output_dir", "OUT"],
    ["plan"],
    ["plan", "/nowhere"],
    ["plan", "builtin:nano", "--gpus", "0"],
    ["plan", "builtin:nano", "--gpu_memory", "-1"],
    ["plan", "builtin:nano", "--activation", "swish9"],
    ["plan", "builtin:nano", "--max_length", "0"],
    ["recipes"],
    ["recipes", "show", "nothing"],
    ["recipes", "copy", "nothing", "OUT"],
    ["quickstart", "--seeds", "x"],
    ["quickstart", "--output_dir", "FILE"],
    ["train"],
    ["--colour"],
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_checkpoint):
    """A folder with a model, rows, pairs and a file that stands where a directory should."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    write_rows(folder / "rows.jsonl", SFT_ROWS)
    write_rows(folder / "pairs.jsonl", DPO_ROWS)
    shutil.copytree(tiny_checkpoint, folder / "model")
    return folder


@pytest.fixture
def out(tmp_path):
    """The output directory of a test."""
    return tmp_path / "out"


@pytest.fixture
def refused(place, out, capfd, monkeypatch):
    """Runs a command that must be refused; returns what it said."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place)
    before = {path: path.stat().st_size for path in place.rglob("*") if path.is_file()}

    def run(argv, *culprits):
        status = main([str(argument) for argument in argv])
        said = capfd.readouterr().err
        lines = [line for line in said.splitlines() if line.strip()]
        assert status == 2, said
        assert "Traceback" not in said
        assert 1 <= len(lines) <= 3, said
        assert lines[-1].startswith("crrelu"), said
        for culprit in culprits:
            assert culprit in said, said
        after = {path: path.stat().st_size for path in place.rglob("*") if path.is_file()}
        assert after == before  # also nothing new
        assert not out.exists()
        return said

    return run


def _recipe(place, out, **changes):
    own = {"model_name_or_path": str(place / "model"), "dataset_name": str(place / "rows.jsonl")}
    values = BASE | own | {"output_dir": str(out)} | changes
    return {key: value for key, value in values.items() if value is not None}


def _write(path, values):
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=[f"{key}={value}" for key, value in WRONG_VALUES])
def test_a_wrong_value_in_a_recipe(place, out, refused, tmp_path, key, value):
    level = {"calibration": "fit"} if key == "calibration_data" else {}
    recipe = _write(tmp_path / "recipe.yaml", _recipe(place, out, **level, **{key: value}))
    said = refused(["sft", "--config", recipe])
    names = [key.rstrip("s"), key.partition("_")[0], str(value).partition("_")[0]]
    assert any(name.lower() in said.lower() for name in names), said


@pytest.mark.parametrize("argv", WRONG_OPTIONS, ids=[" ".join(argv)[:70] for argv in WRONG_OPTIONS])
def test_a_wrong_command_line(place, out, refused, tmp_path, argv):
    names = {
        "OUT": out,
        "FILE": place / "file",
        "FULL": place / "full",
        "DIR": place / "empty",
        "ROWS": place / "rows.jsonl",
        "PAIRS": place / "pairs.jsonl",
    }
    names["RECIPE"] = _write(tmp_path / "recipe.yaml", _recipe(place, out))
    refused([names.get(argument, argument) for argument in argv])


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_wrong_rows(place, out, refused, tmp_path, name):
    data = write_rows(tmp_path / f"{name}.jsonl", WRONG_ROWS[name])
    max_length = 16 if name == "masked" else 48
    recipe = _write(
        tmp_path / "recipe.yaml", _recipe(place, out, dataset_name=data, max_length=max_length, activation=None)
    )
    said = refused(["sft", "--config", recipe])
    assert name in said or "train data" in said


@pytest.mark.parametrize("name", WRONG_PAIRS)
@pytest.mark.parametrize("command", ["dpo", pytest.param("eval", marks=pytest.mark.needs("lm_eval"))])
def test_wrong_pairs(place, out, refused, tmp_path, name, command):
    data = write_rows(tmp_path / f"{name}.jsonl", WRONG_PAIRS[name])
    if command == "eval":
        if name == "one-talks":
            pytest.skip("an evaluation asks for each answer by itself, so they may be written differently")
        model = f"a={place / 'model'}"
        refused(["eval", "--models", model, "--suite", "preference", "--data", data, "--output_dir", out], name)
    else:
        recipe = _write(tmp_path / "recipe.yaml", _recipe(place, out, dataset_name=data))
        refused(["dpo", "--config", recipe], name)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "txt", "jsonl.gz", "docx"])
@pytest.mark.parametrize("content", ["nothing", "noise"])
def test_wrong_files(place, out, refused, tmp_path, ending, content):
    data = tmp_path / f"data.{ending}"
    noise = b"" if content == "nothing" else bytes(range(256)) * 4
    if ending == "jsonl.gz" and content == "nothing":
        noise = gzip.compress(b"")
    data.write_bytes(noise)
    recipe = _write(tmp_path / "recipe.yaml", _recipe(place, out, dataset_name=str(data)))
    refused(["sft", "--config", recipe], "data.")


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, names in LOOKS_AT.items() for name in sorted(names)]
)
def test_a_wrong_model(place, out, refused, tmp_path, command, name):
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    WRONG_MODELS[name](model)
    if command == "sft":
        argv = [
            "sft",
            "--config",
            _write(tmp_path / "recipe.yaml", _recipe(place, out, model_name_or_path=str(model))),
        ]
    elif command == "patch":
        argv = ["patch", model, "--output_dir", out, "--calibration", "none", "--perplexity_data", "none"]
    else:
        argv = [command, model]
    refused(argv, "model")


def test_yaml_that_is_none(refused, tmp_path):
    for text in ("a: [", "- a\n- b", "just words", "\tx: 1", "a: 1\na: {"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text)
        refused(["sft", "--config", recipe], "recipe.yaml")


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=True), st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
_KEYS = st.sampled_from(
    [*{key for key, _ in WRONG_VALUES}, "warmup_steps", "weight_decay", "packing", "logging_steps"]
)


@settings(max_examples=30)
@given(st.dictionaries(_KEYS, _VALUES, min_size=1, max_size=3))
def test_no_recipe_ends_in_a_traceback(changes):
    import tempfile

    from crrelu_llm.errors import InputError
    from crrelu_llm.training.arguments import parse

    with tempfile.TemporaryDirectory() as folder:
        values = BASE | {"model_name_or_path": "builtin:nano", "dataset_name": "builtin:docstrings"} | changes
        values |= {"output_dir": f"{folder}/out"}
        path = f"{folder}/recipe.yaml"
        with open(path, "w") as file:
            yaml.safe_dump(values, file)
        try:
            parse("sft", ["--config", path])
        except InputError as error:
            assert len(str(error).splitlines()) == 1


_CELLS = st.one_of(st.none(), st.text(max_size=8), st.just([]), st.just([U, A]), st.just([{"role": "user"}]))
_ROWS = st.lists(
    st.dictionaries(st.sampled_from(["text", "messages", "prompt", "completion", "chosen", "rejected"]), _CELLS),
    min_size=1,
    max_size=4,
)


@settings(max_examples=50)
@given(_ROWS, st.sampled_from(["sft", "dpo"]))
def test_rows_are_taken_or_refused_in_one_line(tokenizer, rows, kind):
    from crrelu_llm.errors import InputError
    from crrelu_llm.training.arguments import parse
    from crrelu_llm.training.preflight import check_rows

    recipe = parse(
        kind, ["--model_name_or_path", "builtin:nano", "--dataset_name", "x", "--use_cpu", "--bf16", "false"]
    )
    try:
        check_rows(recipe, rows, "rows", tokenizer)
    except InputError as error:
        assert str(error).startswith("rows: row ")
        assert len(str(error).splitlines()) == 1
