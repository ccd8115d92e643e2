"""Arms, seeds and grids as the user writes them."""

import pytest

from crrelu_llm.comparison import arms
from crrelu_llm.errors import InputError


def test_an_arm_is_an_activation_with_options():
    arm = arms.parse_arm("crrelu:calibration=fit:epsilon_per=channel")
    assert (arm.name, arm.activation) == ("crrelu:calibration=fit:epsilon_per=channel", "crrelu")
    assert arm.argv == ["--activation", "crrelu", "--calibration", "fit", "--epsilon_per", "channel"]
    assert arms.parse_arm("native").argv == [] and arms.parse_arm("native").activation is None
    assert arms.parse_arm("prelu").activation == "prelu"


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("crelu", "unknown activation 'crelu'"),
        ("crrelu:calibrate=fit", "calibrate=fit"),
        ("crrelu:calibration", "'calibration'"),
        ("crrelu:calibration=", "calibration="),
        ("", "unknown activation ''"),
        ("crrelu:activation=gelu", "activation=gelu"),
    ],
)
def test_a_wrong_arm_is_named(text, wrong):
    with pytest.raises(InputError, match=wrong) as error:
        arms.parse_arm(text)
    assert "\n" not in str(error.value)


def test_arms_are_distinct():
    with pytest.raises(InputError, match="each arm once"):
        arms.parse_arms(["gelu", "gelu"])


@pytest.mark.parametrize(
    "names, baseline",
    [(["crrelu", "gelu", "native"], "gelu"), (["relu", "native"], "native"), (["silu", "crrelu"], "silu")],
)
def test_the_baseline_is_gelu_then_native_then_the_first(names, baseline):
    assert arms.choose_baseline(arms.parse_arms(names), None) == baseline


def test_a_baseline_must_be_an_arm():
    with pytest.raises(InputError, match="--baseline mish is none of the arms"):
        arms.choose_baseline(arms.parse_arms(["gelu", "crrelu"]), "mish")


def test_a_grid_is_every_combination():
    points = arms.parse_grid(["beta=0.1,1", "max_steps=5"])
    assert points == [{"beta": "0.1", "max_steps": "5"}, {"beta": "1", "max_steps": "5"}]
    assert arms.grid_argv(points[0]) == ["--beta", "0.1", "--max_steps", "5"]
    assert arms.grid_name(points[0]) == "beta=0.1,max_steps=5"
    assert arms.parse_grid([]) == [{}]
    assert [arms.number(value) for value in ("5", "0.1", "1e-3", "cosine")] == [5, 0.1, 1e-3, "cosine"]


@pytest.mark.parametrize("texts", [["beta"], ["beta="], ["=1"], ["beta=1,1"], ["beta=1", "beta=2"]])
def test_a_wrong_grid_is_refused(texts):
    with pytest.raises(InputError, match="--grid"):
        arms.parse_grid(texts)


def test_a_grid_over_the_patch_gets_checkpoints_of_its_own():
    assert arms.is_patch_key("epsilon_init") and arms.is_patch_key("calibration_tokens")
    assert not arms.is_patch_key("beta")
