"""`crrelu eafo derive` and `plot` through the command line."""

import json

import pytest

from crrelu_llm.cli.main import main


def test_derive_arrives_at_crrelu(tmp_path, capsys):
    assert main(["eafo", "derive", "--activation", "relu", "--density", "normal", "--output_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "relu × normal(0,1)"
    assert "  -∞ < t < 0: none, f′ = 0" in lines
    assert any(line.endswith("f(t) + ε·t*exp(-t**2/2)   = CRReLU") for line in lines)
    (found,) = json.loads((tmp_path / "derivation.json").read_text())
    assert found["pieces"][1]["direction"] == "-t*exp(-t**2/2)"
    assert found["extension"] == {
        "bump": "t*exp(-t**2/2)",
        "name": "CRReLU",
        "sign": -1,
        "latex": r"t e^{- \frac{t^{2}}{2}}",
    }
    assert found["latex"] in (tmp_path / "derivation.tex").read_text()
    assert [row["applies"] for row in found["values"]] == [row["t"] > 0 for row in found["values"]]


def test_derive_from_samples_is_numerical(tmp_path, capsys):
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=20_000))
    assert main(["eafo", "derive", "--density", f"samples:{tmp_path / 'x.npy'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pieces"] == [] and found["latex"] is None
    near = {round(row["t"]): row["correction"] for row in found["values"] if row["applies"]}
    assert near[1] == pytest.approx(-0.242, abs=0.06)  # −t·φ(t)


def test_the_table_of_all_activations(capsys):
    assert main(["eafo", "derive", "--activation", "all", "--density", "logistic"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and all("logistic(0,1)" in line for line in lines)


@pytest.mark.parametrize("name", [pytest.param("relu.png", marks=pytest.mark.slow), "gelu.svg"])
def test_plot(name, tmp_path):
    path = tmp_path / "new" / name
    assert main(["eafo", "plot", "--activation", name.partition(".")[0], "--output", str(path)]) == 0
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in content
    assert [entry.name for entry in path.parent.iterdir()] == [name]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["derive", "--activation", "nope"], "no activation 'nope'"),
        (["derive", "--density", "nope"], "no density 'nope'"),
        (["derive", "--density", "normal(0,-1)"], "must be above 0"),
        (["plot", "--output", "x.gif"], "the ending must be one of .png .svg .pdf"),
        (["derive", "--output_dir", f"{__file__}/below"], "cannot write there"),
        (["nope"], "invalid choice"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(argv, message, capsys):
    assert main(["eafo", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
