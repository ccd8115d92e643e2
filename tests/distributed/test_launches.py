"""Two real processes under every shipped Accelerate configuration train what one process trains, and resume."""

import json
from itertools import product

import pytest
import torch
from launches import CASES, COMMON, differences, launch, recipe, record, weights
from runs import LORA, losses
from safetensors.torch import load_file

from crrelu_llm.activation import AFFINE
from crrelu_llm.cli.main import main

DISTRIBUTION = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
ZERO = dict.fromkeys(("loss", "epsilon", "weights", "reload"), 0.0)
QLORA = LORA | {"lora_dropout": 0.0, "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}


def run_both(workshop, configuration, cases, *options, **values):
    """Every case on two processes, once more resumed at its half, and on one process."""
    commands = []
    for case in cases:
        commands.append(recipe(workshop, case, configuration, case, **values))
        half = str(workshop.folder / case / "checkpoint-2")
        resumed = recipe(workshop, f"{case}-resumed", configuration, case, **values)
        commands.append([*resumed, "--resume_from_checkpoint", half])
    launch(workshop.folder, configuration, commands, *options)
    for case in cases:
        assert main(recipe(workshop, f"{case}-one", None, case, **values)) == 0


def where(result):
    """The number of processes that a result says it was made in, and how they shared the work."""
    return result["environment"]["processes"], result["environment"]["distribution"]


def check(workshop, configuration, case, tolerance):
    """Asserts that a case is what one process gives, and its resumed half exactly the whole; returns the first."""
    assert where(record(workshop, case)) == (2, DISTRIBUTION[configuration])
    assert len(set(losses(record(workshop, case)))) == COMMON["max_steps"]
    exact = (".epsilon", ".center", ".width", ".scale", ".shift", ".gain", ".offset")
    dtypes = {value.dtype for key, value in weights(workshop, case).items() if key.endswith(exact)}
    assert dtypes == {torch.float32} or (not dtypes and not record(workshop, case)["epsilon"])
    assert differences(workshop, f"{case}-resumed", case) == ZERO
    found = differences(workshop, case, f"{case}-one")
    assert found["loss"] < tolerance and found["epsilon"] < tolerance, found
    assert found["weights"] < 20 * tolerance and found["reload"] < 200 * tolerance, found
    return found


@pytest.mark.parametrize(
    ("configuration", "cases"),
    [("fsdp2", ["dpo-full"]), pytest.param("zero3", ["sft-lora"], marks=pytest.mark.slow)],
)
def test_sharded_training_is_that_of_one_process(workshop, configuration, cases):
    run_both(workshop, configuration, cases)
    for case in cases:
        check(workshop, configuration, case, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", DISTRIBUTION)
def test_every_launch_and_trainer(workshop, capsys, configuration):
    run_both(workshop, configuration, CASES)
    lines = [f"\n{'launch':7} {'run':9} processes  loss     epsilon  reload   (largest difference to one process)"]
    for case in CASES:
        found = check(workshop, configuration, case, 1e-5)
        processes = record(workshop, case)["environment"]["processes"]
        numbers = "  ".join(f"{found[key]:.1e}" for key in ("loss", "epsilon", "reload"))
        lines.append(f"{configuration:7} {case:9} {processes:9}  {numbers}")
    with capsys.disabled():
        print("\n".join(lines), end="")


@pytest.mark.slow
@pytest.mark.parametrize(("configuration", "dtype"), [*product(["fsdp2", "zero2", "zero3"], ["float32", "bfloat16"])])
def test_in_bfloat16(workshop, configuration, dtype):
    """bfloat16 autocast over weights of either type: ε is saved in float32 and moves as in one process."""
    run_both(workshop, configuration, CASES, "--mixed_precision", "bf16", bf16=True, dtype=dtype)
    for case in CASES:
        check(workshop, configuration, case, 2e-2)
        if case.startswith("dpo"):  # ln 2, not what bfloat16 makes of it
            assert losses(record(workshop, case))[0] == pytest.approx(0.693147, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["fsdp2", "zero3"])
@pytest.mark.parametrize(
    "options",
    [
        {"blend_steps": 3, "epsilon_init": 0.2},
        {"recompute_activation": True, "epsilon_per": "channel"},
        {"recompute_activation": True, "gradient_checkpointing": True},
    ],
    ids=["blend", "recompute", "checkpointing"],
)
def test_ways_of_training(workshop, configuration, options):
    cases = ["sft-full", "sft-lora", "dpo-full"]
    run_both(workshop, configuration, cases, **options)
    for case in cases:
        check(workshop, configuration, case, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["fsdp2", "zero2", "zero3"])
def test_a_fitted_density_in_bfloat16(workshop, configuration):
    """Every process trains with the centres and widths of the patched checkpoint, and saves them in all digits."""
    fitted = {"density": "fitted", "calibration": "fit", "calibration_tokens": 256, "dtype": "bfloat16", "bf16": True}
    run_both(workshop, configuration, ["sft-full", "sft-lora"], "--mixed_precision", "bf16", **fitted)
    for case in ("sft-full", "sft-lora"):
        check(workshop, configuration, case, 2e-2)
        patched = load_file(workshop.folder / case / "patched" / "model.safetensors")
        saved = {key.removeprefix("base_model.model."): value for key, value in weights(workshop, case).items()}
        moments = [key for key in patched if key.endswith((".center", ".width"))]
        assert moments and all(torch.equal(saved[key], patched[key]) for key in moments)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", DISTRIBUTION)
@pytest.mark.parametrize("activation", ["crrelu", "gelu"])
@pytest.mark.parametrize("rate", [0.0, 0.01], ids=["frozen", "learned"])
def test_calibrated_activations(workshop, configuration, activation, rate):
    """Scale, shift, gain and offset stay those of the patched checkpoint in every process, or learn as in one."""
    cases = ["sft-full", "sft-lora", "dpo-lora"]
    asked = {"activation": activation, "calibration": "fit", "calibration_tokens": 2048, "affine_learning_rate": rate}
    run_both(workshop, configuration, cases, **asked)
    for case in cases:
        check(workshop, configuration, case, 1e-5)
        patched = load_file(workshop.folder / case / "patched" / "model.safetensors")
        saved = {key.removeprefix("base_model.model."): value for key, value in weights(workshop, case).items()}
        four = [key for key in patched if key.rpartition(".")[2] in AFFINE and key in saved]
        assert len(four) == (8 if rate or activation == "crrelu" or case == "sft-full" else 0)
        assert all(torch.equal(saved[key], patched[key]) == (rate == 0) for key in four)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", DISTRIBUTION)
def test_a_density_that_is_tracked(workshop, configuration):
    """The moments are those of all processes' tokens; the running ones survive a resume between two updates."""
    cases = ["sft-full", "sft-lora", "dpo-full"]
    density = {"density": "fitted", "calibration_tokens": 256, "density_update_steps": 3, "density_momentum": 0.5}
    run_both(workshop, configuration, cases, **density)
    for case in cases:
        check(workshop, configuration, case, 1e-5)
        ours, one = (
            [entry["density/width"] for entry in record(workshop, name)["history"] if "loss" in entry]
            for name in (case, f"{case}-one")
        )
        assert ours == pytest.approx(one, abs=1e-5)
        assert len(set(ours)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("configuration", DISTRIBUTION)
def test_an_l1_term_and_one_activation_a_layer(workshop, configuration):
    """The mean of the processes' means is that of all, where they have as many tokens; resumed exactly too."""
    values = {"activation": "0=relu,1=crrelu", "activation_l1": 0.5, "gradient_checkpointing": True}
    run_both(workshop, configuration, ["sft-full"], **values)
    check(workshop, configuration, "sft-full", 1e-5)
    both = [record(workshop, name)["history"] for name in ("sft-full", "sft-full-one")]
    ours, theirs = ([entry["activation_l1"] for entry in history if "loss" in entry] for history in both)
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == COMMON["max_steps"]


@pytest.mark.slow
def test_bfloat16_weights_without_autocast(workshop):
    """FSDP2 wants one dtype a unit: ε in float32 among bfloat16 weights becomes a unit of its own."""
    run_both(workshop, "fsdp2", CASES, dtype="bfloat16")
    for case in CASES:
        check(workshop, "fsdp2", case, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["fsdp2", "zero2", "zero3"])
def test_qlora(workshop, configuration):
    cases = ["sft-lora", "dpo-lora"]
    options = QLORA | {"dtype": "bfloat16"}
    run_both(workshop, configuration, cases, "--mixed_precision", "bf16", bf16=True, **options)
    for case in cases:
        check(workshop, configuration, case, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["fsdp2", "zero3"])
def test_tied_weights_and_epsilon_per_channel(workshop, tiny_checkpoint, configuration):
    workshop.model = str(tiny_checkpoint)  # a GPT-2; DPO switches its dropout off
    run_both(workshop, configuration, ["dpo-full"], epsilon_per="channel")
    check(workshop, configuration, "dpo-full", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", DISTRIBUTION)
def test_a_comparison(workshop, configuration):
    def commands(configuration):
        for case in ("sft-full", "dpo-lora"):
            name = case if configuration is None else f"{case}-two"
            kind, *argv = recipe(workshop, f"{name}-recipe", configuration, case)
            asked = ["--arms", "gelu", "crrelu:calibration=fit", "--seeds", "0", "1"]
            yield ["compare", kind, *argv, *asked, "--output_dir", str(workshop.folder / f"{name}-comparison")]

    launch(workshop.folder, configuration, list(commands(configuration)))
    for command in commands(None):
        assert main(command) == 0
    for case in ("sft-full", "dpo-lora"):
        two, one = (
            json.loads((workshop.folder / f"{name}-comparison" / "report.json").read_text())
            for name in (f"{case}-two", case)
        )
        assert where(two) == (2, DISTRIBUTION[configuration])
        for ours, theirs in zip(two["arms"], one["arms"], strict=True):
            for mine, yours in zip(ours["runs"], theirs["runs"], strict=True):
                assert mine["metrics"] == pytest.approx(yours["metrics"], rel=1e-4, abs=1e-5)
                assert mine["epsilon"] == pytest.approx(yours["epsilon"], abs=1e-6)
                assert mine["train_seconds"] > 0
        for mine, yours in zip(two["comparisons"], one["comparisons"], strict=True):
            assert mine["difference"] == pytest.approx(yours["difference"], rel=1e-2, abs=1e-5)
        # The starting points, taken from the sharded model before its first step
        befores = [
            sorted((workshop.folder / f"{name}-comparison").glob("*/before.json")) for name in (f"{case}-two", case)
        ]
        for mine, yours in zip(*befores, strict=True):
            assert json.loads(mine.read_text()) == pytest.approx(json.loads(yours.read_text()), rel=1e-4, abs=1e-5)
