"""The ε study: its arms and numbers, and `crrelu eafo epsilon` as a user runs it."""

import json
import math

import numpy as np
import pytest
import torch
from runs import Workshop, write_recipe
from scipy.integrate import quad
from synthetic import report_of

from crrelu_llm.activation import crrelu
from crrelu_llm.cli.main import main
from crrelu_llm.comparison.arms import parse_arms
from crrelu_llm.errors import InputError
from crrelu_llm.studies.sensitivity import arm_names, shape, study, text
from crrelu_llm.studies.sensitivity_plot import plot

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, tiny_checkpoint):
    """A folder with a little text, in which recipes of a tiny GPT-2 are run."""
    return Workshop(tmp_path_factory.mktemp("epsilon"), tiny_checkpoint)


def argv(workshop, *options, **keys):
    """The command line of a study of two steps; a key that is None is left out of the recipe."""
    values = workshop.values("sft", "unused", max_steps=2, **keys)
    drop = {"activation", "output_dir", "seed", *(key for key, value in keys.items() if value is None)}
    recipe = {key: value for key, value in values.items() if key not in drop}
    return ["eafo", "epsilon", "--config", write_recipe(workshop.folder / "recipe.yaml", recipe), *options]


def test_the_arms_are_native_and_three_ways_for_every_value():
    arms = parse_arms(arm_names([-1.0, -0.0, 0.01]))
    assert arms[0].activation is None and len(arms) == 10
    options = [dict(arm.options) for arm in arms[1:]]
    assert {entry["calibration"] for entry in options} == {"none"}
    ways = [(entry["epsilon_per"], entry.get("epsilon_learning_rate")) for entry in options]
    assert ways == [("layer", "0")] * 3 + [("layer", None)] * 3 + [("channel", None)] * 3
    assert [entry["epsilon_init"] for entry in options] == ["-1", "0", "0.01"] * 3


@pytest.mark.parametrize("values", [[0.1, 0.1], [0.0, -0.0], [math.nan], [math.inf]])
def test_values_are_finite_and_each_there_once(values):
    with pytest.raises(InputError, match="--values: finite numbers, each once"):
        arm_names(values)


@pytest.mark.parametrize("epsilon", [-3.0, -1.0, -0.3, 0.0, 0.01, 1.0, 2.5, 40.0])
def test_the_shape_is_that_of_crrelu(epsilon):
    found = shape(epsilon)
    x = torch.linspace(-8, 12, 20001, dtype=torch.float64, requires_grad=True)
    crrelu(x, torch.tensor([epsilon], dtype=torch.float64)).sum().backward()
    grid, slope = x.detach().numpy(), x.grad.numpy()
    inside = np.zeros(len(grid), dtype=bool)
    for low, high in found["falling"]:
        inside |= (grid > (-np.inf if low is None else low)) & (grid < high)
    clear = np.abs(slope) > 1e-3  # grid points beside the ends of an interval have no sure sign
    assert (inside[clear] == (slope[clear] < 0)).all()
    at_minus_one = crrelu(torch.tensor([-1.0], dtype=torch.float64), torch.tensor([epsilon], dtype=torch.float64))
    assert found["value_at_minus_one"] == pytest.approx(float(at_minus_one))

    def weighted(t):
        derivative = (t > 0) + epsilon * (1 - t * t) * math.exp(-t * t / 2)
        return derivative**2 * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    assert found["mean_square_slope"] == pytest.approx(quad(weighted, -10, 0)[0] + quad(weighted, 0, 10)[0])


def report():
    """A comparison's report in which one run was stopped and one ended without a number."""

    def arm(name, losses, **epsilons):
        (parsed,) = parse_arms([name])
        runs = [
            {"seed": seed, "status": "done", "metrics": {"loss": loss}, "epsilon": epsilons}
            for seed, loss in zip(SEEDS, losses, strict=True)
        ]
        about = {"arm": name, "activation": parsed.activation or "native", "options": dict(parsed.options)}
        return about | {"before": {"loss": 6.0}, "runs": runs}

    frozen, layer, channel = arm_names([0.5])[1:]
    arms = [
        arm("native", (5.0, 5.2)),
        arm("gelu", (5.0, 5.0)),
        arm(frozen, (5.5, 5.7), a=0.5, b=0.5),
        arm(layer, (5.1, None), a=0.4, b=0.6),
        arm(channel, (5.3, 5.4), a=0.3, b=0.5),
    ]
    arms[-1]["runs"][0] |= {"status": "failed", "error": "RuntimeError: out of memory", "metrics": {}, "epsilon": {}}
    arms[-1]["runs"][1] |= {"status": "failed", "error": "not run yet", "metrics": {}, "epsilon": {}}
    return report_of(command="crrelu", arms=arms)


def test_runs_that_failed_are_shown_and_kept_out_of_the_means(tmp_path):
    document = study(report())
    assert document["native"] == {"before": 6.0, "after": pytest.approx(5.1)}
    frozen, layer, channel = document["cases"]
    assert (frozen["way"], layer["way"], channel["way"]) == ("frozen", "learned per layer", "learned per channel")
    assert (frozen["after"], frozen["after_low"], frozen["after_high"]) == (pytest.approx(5.6), 5.5, 5.7)
    assert (layer["after"], layer["epsilon_end"], layer["seeds"]) == (5.1, pytest.approx(0.5), [0])
    assert layer["failed"] == [{"seed": 1, "reason": "the loss after training is not a number"}]
    assert channel["after"] is None and len(channel["failed"]) == 1 and channel["missing"] == [1]
    lines = text(document).splitlines()
    assert lines[4].endswith("0, 1 failed, 1 not run yet")
    assert "failed: learned per channel, ε = 0.5, seed 0: RuntimeError: out of memory" in lines
    assert "failed: learned per layer, ε = 0.5, seed 1: the loss after training is not a number" in lines
    plot(document, tmp_path / "epsilon.svg")
    assert (tmp_path / "epsilon.svg").read_text().count("<!-- failed runs") == 2


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        (
            [],
            {"calibration": "refit"},
            "calibration: refit would overwrite the start value of ε; set calibration: none",
        ),
        (["--epsilon_learning_rate", "0"], {}, "epsilon_learning_rate: 0 freezes the ε that should be learned"),
        (["--values", "0.1", "0.1"], {}, "--values: finite numbers, each once, not 0.1 0.1"),
        (["--seeds", "0", "0"], {}, "--seeds must be different whole numbers of 0 or more"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(workshop, options, keys, message, capsys):
    out = workshop.folder / "refused"
    assert main([*argv(workshop, *options, **keys), "--output_dir", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


@pytest.mark.slow
def test_a_study_prints_and_writes_what_it_found(workshop, capsys):
    out = workshop.folder / "study"
    command = [*argv(workshop, epsilon_learning_rate=0.05), "--output_dir", str(out), "--json", "--values", "-1"]
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads((out / "epsilon.json").read_text()) == document
    assert (out / "epsilon.png").stat().st_size > 10_000 and (out / "report.html").is_file()
    assert not list(out.glob("*/seed-0/*.safetensors"))
    frozen, layer, channel = document["cases"]
    assert frozen["before"] == layer["before"] == channel["before"] != document["native"]["before"]
    assert frozen["epsilon_low"] == frozen["epsilon_high"] == -1
    assert all(case["epsilon_low"] != -1 and case["after"] != frozen["after"] for case in (layer, channel))


@pytest.mark.slow
def test_a_study_of_the_embedded_model_takes_more_values_later(tmp_path, capsys):
    workshop, out = Workshop(tmp_path, "builtin:nano"), tmp_path / "study"
    command = [*argv(workshop), "--output_dir", str(out), "--json", "--values", "-1"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert all(
        case["before"] > first["native"]["before"] and case["after"] < case["before"] for case in first["cases"]
    )
    assert main([*command, "0.01"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count(": kept") == 4 and captured.err.count(": training") == 3
    second = json.loads(captured.out)
    assert [case for case in second["cases"] if case["epsilon_init"] == -1] == first["cases"]
    assert len(second["cases"]) == 6


@pytest.mark.slow
def test_a_run_that_diverges_is_shown_as_failed(workshop, capsys):
    out = workshop.folder / "diverged"
    options = ["--values", "1", "--learning_rate", "1e30", "--output_dir", str(out)]
    assert main([*argv(workshop), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("seed 0: the loss after training is not a number") == 3
    assert all(len(case["failed"]) == 1 for case in json.loads((out / "epsilon.json").read_text())["cases"])


@pytest.mark.slow
def test_a_frozen_epsilon_is_the_same_per_layer_and_per_channel(workshop):
    plain = "crrelu:calibration=none:epsilon_init=0.3:epsilon_learning_rate=0"
    arms = [f"{plain}:epsilon_per={per}" for per in ("layer", "channel")]
    out = workshop.folder / "frozen"
    _, _, _, recipe = argv(workshop)
    assert main(["compare", "sft", "--config", recipe, "--arms", *arms, "--seeds", "0", "--output_dir", str(out)]) == 0
    layer, channel = (arm["runs"][0] for arm in json.loads((out / "report.json").read_text())["arms"])
    assert layer["metrics"] == pytest.approx(channel["metrics"], rel=1e-6)
    assert [entry["loss"] for entry in layer["history"]] == [entry["loss"] for entry in channel["history"]]
