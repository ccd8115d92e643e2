"""The shipped recipes against the installed TRL and Accelerate, and how they get into the wheel."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from crrelu_llm.errors import InputError
from crrelu_llm.recipes_path import recipes_dir
from crrelu_llm.training.kinds import KINDS, kind_of

ROOT = Path(__file__).parents[1]
RECIPES = recipes_dir()
ALL = sorted(RECIPES.rglob("*.yaml"))
ACCELERATE = [path for path in ALL if path.parent.name == "accelerate_configs"]
TRAINING = [path for path in ALL if path not in ACCELERATE]
SECTION = {"activation", "calibration", "calibration_data", "calibration_tokens", "calibration_images", "density"}


def name(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def kind(path: Path) -> str:
    parts = path.relative_to(RECIPES).parts
    return "image" if parts[0] == "paper-vision" else next((p for p in (*parts, path.stem) if p in KINDS), "sft")


def parse(path: Path, *overrides: str):
    from crrelu_llm.training.arguments import parse

    # bf16, the recipes' default on GPUs, is refused on a machine without one unless the CPU is asked for.
    return parse(kind(path), ["--config", str(path), "--use_cpu", "true", *overrides])


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_promised_recipes_are_there():
    models = [f"{model}/{kind}/config_{how}" for model in ("smollm2-135m", "qwen3-0.6b")
              for kind in ("sft", "dpo") for how in ("full", "lora", "qlora")]  # fmt: skip
    accelerate = [
        f"accelerate_configs/{mode}" for mode in ("single_gpu", "ddp", "fsdp2", "zero2", "zero3", "multi_node")
    ]
    promised = {*models, *accelerate, "gpt2/sft/config_full", "gpt2/dpo/config_full"}
    promised |= {f"smollm2-135m/{kind}/config_full" for kind in ("kto", "reward", "grpo")}
    promised |= {f"gemma-3-270m/{kind}/config_full" for kind in ("sft", "dpo")}
    promised |= {f"paper-vision/{model}_{data}" for model in ("vit", "deit", "tnt")
                 for data in ("cifar10", "cifar100", "imagenet")}  # fmt: skip
    promised |= {"paper-vision/small_cifar10", "paper-vision/finetune_cifar10"}
    promised |= {"nano/pretrain", "nano/sft", "eafo/fit", "eafo/dynamic"}
    assert promised <= {name(path) for path in ALL}


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_every_value_of_a_recipe_reaches_the_arguments(path):
    recipe = parse(path)
    groups = (recipe.script, recipe.training, recipe.model, recipe.mixture, recipe.activation)
    for key, value in yaml.safe_load(path.read_text()).items():
        holders = [group for group in groups if hasattr(group, key)]
        assert holders, key
        assert getattr(holders[0], key) == ([] if value == "none" and key == "report_to" else value), key


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_without_its_activation_section_a_recipe_is_trls_own(path, tmp_path):
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    values = yaml.safe_load(path.read_text())
    plain = {
        key: value
        for key, value in values.items()
        if key not in SECTION and not key.startswith(("epsilon_", "density_"))
    }
    copy = tmp_path / "plain.yaml"
    copy.write_text(yaml.safe_dump(plain))
    about = kind_of(kind(path))
    parser = TrlParser((about.script, about.config, ModelConfig, DatasetMixtureConfig))
    _, training, model, _ = parser.parse_args_and_config(["--config", str(copy), "--use_cpu", "true"])
    assert training.output_dir == values["output_dir"]
    assert model.model_name_or_path == values.get("model_name_or_path")


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_a_misspelt_key_is_refused(path, tmp_path):
    copy = tmp_path / kind(path) / "mine.yaml"
    copy.parent.mkdir()
    copy.write_text(path.read_text().replace("learning_rate:", "learning_rat:", 1))
    from crrelu_llm.training.arguments import parse

    with pytest.raises(InputError, match="learning_rat"):
        parse(kind(path), ["--config", str(copy), "--use_cpu", "true"])


@pytest.mark.parametrize("path", ALL, ids=name)
def test_the_opening_comment_has_the_command(path):
    lines = path.read_text().splitlines()
    comment = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert comment and len(comment[0].lstrip("# ")) > 20  # what `crrelu recipes list` prints
    text = "\n".join(comment)
    own = f"recipes/{name(path)}.yaml"
    if path in ACCELERATE:
        assert f"accelerate launch --config_file {own}" in text
    elif name(path) != "nano/pretrain":  # which starts from a folder that nano/initialise.py makes
        assert own in text


@pytest.mark.parametrize("path", [path for path in TRAINING if path.parts[-3] != "recipes"], ids=name)
def test_model_recipes_show_every_command_with_files_that_exist(path):
    text = path.read_text()
    own = f"{kind(path)} --config recipes/{name(path)}.yaml"
    assert f"crrelu {own}" in text
    assert f"crrelu compare {own} --arms gelu crrelu --seeds 0 1 2" in text
    assert f"-m crrelu_llm {own}" in text
    mentioned = {word.removeprefix("recipes/") for word in text.split() if word.startswith("recipes/")}
    assert all((RECIPES / word).is_file() for word in mentioned), mentioned


@pytest.mark.parametrize("path", [path for path in TRAINING if "config_" in path.name], ids=name)
def test_the_file_name_says_what_is_trained(path):
    from trl import get_peft_config, get_quantization_config

    model = parse(path).model
    peft, quantisation = get_peft_config(model), get_quantization_config(model)
    assert (peft is None) == (path.stem == "config_full")
    assert (quantisation is not None) == (path.stem == "config_qlora")
    if peft is not None:
        assert (peft.r, peft.lora_alpha, peft.target_modules) == (32, 16, "all-linear")
    if quantisation is not None:
        assert quantisation.bnb_4bit_use_double_quant and str(quantisation.bnb_4bit_compute_dtype) == "torch.bfloat16"


def test_gpt2_dpo_starts_from_the_unpatched_output_of_gpt2_sft():
    sft, dpo = (parse(RECIPES / "gpt2" / kind / "config_full.yaml") for kind in ("sft", "dpo"))
    assert dpo.model.model_name_or_path == sft.training.output_dir
    assert sft.activation.patch_config() is None
    assert dpo.activation.patch_config().activation == "crrelu"


@pytest.mark.parametrize("path", [path for path in TRAINING if "config_" in path.name], ids=name)
def test_the_baseline_is_one_option_away(path):
    section = parse(path, "--activation", "gelu").activation
    assert section.patch_config().activation == "gelu"
    assert section.epsilon_learning_rate > parse(path).training.learning_rate


def launch_arguments(path: Path):
    """The arguments `accelerate launch` works with, after its own validation."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "crrelu_llm", "sft"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("single_gpu", {"multi_gpu": False, "use_fsdp": False, "use_deepspeed": False, "num_processes": 1}),
        ("ddp", {"multi_gpu": True, "num_processes": 8}),
        ("fsdp2", {"use_fsdp": True, "fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
        ("multi_node", {"use_fsdp": True, "fsdp_version": 2, "num_machines": 2, "num_processes": 16}),
        ("zero2", {"use_deepspeed": True, "zero_stage": 2, "num_processes": 8}),
        ("zero3", {"use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True, "num_processes": 8}),
    ],
)
def test_accelerate_takes_its_configurations(mode, expected):
    arguments = launch_arguments(RECIPES / "accelerate_configs" / f"{mode}.yaml")
    assert {key: getattr(arguments, key) for key in expected} == expected
    assert (arguments.mixed_precision, arguments.module) == ("bf16", True)


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_accelerate_knows_every_nested_key(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    config = load_config_from_file(str(path))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known
    # A number here would have to equal the recipe's own; absent, the recipe's is taken.
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(config.deepspeed_config)


def test_fsdp2_plugin_is_built_from_the_configuration(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    for key, value in prepare_multi_gpu_env(launch_arguments(RECIPES / "accelerate_configs" / "fsdp2.yaml")).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


def test_every_package_is_listed_for_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "crrelu_llm").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert packages | {"crrelu_llm.eval", "crrelu_llm.recipes"} == set(project["tool"]["setuptools"]["packages"])


def test_an_installed_wheel_has_the_recipes_and_suites(tmp_path):
    source = tmp_path / "source"  # setuptools writes beside the sources
    for folder in ("crrelu_llm", "eval", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = "import setuptools.build_meta as b; b.build_wheel('out')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    installed = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*")}
    data = [path for path in RECIPES.rglob("*") if path.suffix in {".yaml", ".md", ".py"}]
    data += [path for path in (ROOT / "crrelu_llm").rglob("*") if {"assets", "templates"} & set(path.parts)]
    data += [path for folder in ("suites", "tasks") for path in (ROOT / "eval" / folder).iterdir()]
    expected = {path.relative_to(ROOT).as_posix() for path in data if path.is_file()}
    assert {path if path.startswith("crrelu_llm/") else f"crrelu_llm/{path}" for path in expected} <= installed
    assert "crrelu_llm/py.typed" in installed
    assert not any(path.startswith("crrelu_llm/eval/results") for path in installed)
    assert {path.split("/")[0] for path in installed} == {"crrelu_llm", "crrelu_llm-0.1.0.dist-info"}
    script = "import sys; sys.path.insert(0, 'site'); import crrelu_llm.recipes_path as r; print(r.recipes_dir())"
    printed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(printed.stdout.strip()) == tmp_path / "site" / "crrelu_llm" / "recipes"
