"""Arms, seeds and grids as the user writes them."""

from urllib.parse import unquote

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
    assert arms.default_baseline(arms.parse_arms(names)) == baseline


def test_a_baseline_must_be_an_arm():
    with pytest.raises(InputError, match="--baseline mish is not one of the arms"):
        arms.check_baseline(arms.parse_arms(["gelu", "crrelu"]), "mish")
    arms.check_baseline(arms.parse_arms(["gelu", "crrelu"]), "crrelu")


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


@pytest.mark.parametrize("key", ["seed", "output_dir", "activation", "dataset_name", "dataset_train_split"])
def test_a_grid_cannot_vary_what_a_comparison_shares(key):
    with pytest.raises(InputError, match=f"--grid {key}=…"):
        arms.check_grid([{key: "1"}], arms.parse_arms(["gelu"]))


def test_a_grid_and_an_arm_cannot_set_the_same_key():
    with pytest.raises(InputError, match="the arm crrelu:epsilon_init=1 sets this key too"):
        arms.check_grid([{"epsilon_init": "2"}], arms.parse_arms(["gelu", "crrelu:epsilon_init=1"]))


def test_values_may_hold_colons_and_slashes_but_lead_nowhere_else():
    arm = arms.parse_arm("crrelu:calibration_data=builtin:docstrings:calibration=fit")
    assert arm.options == (("calibration_data", "builtin:docstrings"), ("calibration", "fit"))
    assert "/" not in arms.directory_name("crrelu:calibration_data=../../elsewhere")
    assert "/" not in arms.grid_name({"calibration_data": "../a"})


@pytest.mark.parametrize("name", ["crrelu:calibration=none", "crrelu:data=C:\\x/y*?", "gelu", "a%3Ab", "a:b"])
def test_an_arms_directory_is_a_name_on_every_file_system(name):
    found = arms.directory_name(name)
    assert not set(found) & set('<>:"/\\|?*')
    assert unquote(found) == name  # so no two arms have one


def test_a_comparison_of_an_earlier_version_keeps_its_directories(tmp_path):
    from crrelu_llm.comparison.arms import arm_dir

    assert arm_dir(tmp_path, "crrelu:calibration=none", {}).name == "crrelu%3Acalibration=none"
    (tmp_path / "crrelu:calibration=none").mkdir()
    assert arm_dir(tmp_path, "crrelu:calibration=none", {}).name == "crrelu:calibration=none"
