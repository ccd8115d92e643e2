"""`crrelu eafo fit` and `rank` on the embedded model: files, tables, pictures, and what is refused."""

import json

import pytest
from comparisons import ARMS, write_comparison

from crrelu_llm.cli import main as command_line


@pytest.fixture
def few(text_file):
    return ("--data", text_file, "--tokens", "128", "--samples", "500")


def eafo(*argv):
    return command_line.main(["eafo", *map(str, argv)])


def test_fit_writes_its_document_and_a_picture(few, tmp_path, capsys):
    directory = tmp_path / "out"
    assert eafo("fit", "builtin:nano", *few, "--output_dir", directory, "--plot") == 0
    printed = capsys.readouterr()
    assert [path.name for path in sorted(directory.iterdir())] == ["eafo_fit.json", "eafo_fit.png"]
    document = json.loads((directory / "eafo_fit.json").read_text())
    assert (document["tokens"], len(document["sites"])) == (128, 4)
    lines = printed.out.splitlines()
    for line, site in zip(lines[2:6], document["sites"], strict=True):
        assert line.split()[:3] == [site["path"], f"{site['mean']:.3f}", f"{site['std']:.3f}"]
        assert site["std"] ** 2 == pytest.approx(site["channels"]["between"] ** 2 + site["channels"]["within"] ** 2)
    assert "crrelu patch builtin:nano --density fitted" in printed.err


def test_rank_side_by_side(few, tmp_path, capsys):
    names = ("relu", "gelu", "crrelu", "silu+eafo")
    more = ("--untrained", "--finetuned", "builtin:nano", "--activations", *names)
    assert eafo("rank", "builtin:nano", *few, *more, "--output_dir", tmp_path, "--plot", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "eafo_rank.json").read_text())
    assert (tmp_path / "eafo_rank.png").stat().st_size > 1000
    pretrained, untrained, finetuned = document["models"]
    assert [model["state"] for model in document["models"]] == ["pretrained", "untrained", "finetuned"]
    assert pretrained["means"] == finetuned["means"] != untrained["means"]
    assert [entry["activation"] for entry in pretrained["means"]] == list(names)
    assert sorted(entry["rank"] for entry in pretrained["means"]) == [1, 2, 3, 4]
    assert pretrained["means"][0]["entropy"] is None  # −∞


def test_rank_against_the_losses_of_a_comparison(few, tmp_path, capsys):
    directory = write_comparison(tmp_path / "losses")
    assert eafo("rank", "builtin:nano", *few, "--losses", directory, "--activations", "relu",
                "--output_dir", tmp_path / "out", "--plot") == 0  # fmt: skip
    out = capsys.readouterr().out
    assert f"({directory}, calibration none): 5 arms, 2 seeds" in out
    found = json.loads((tmp_path / "out" / "eafo_rank.json").read_text())
    assert {entry["activation"] for entry in found["models"][0]["means"]} == set(ARMS)
    rho = found["prediction"]["predictors"][0]["spearman"]
    assert f"{rho['value']:+.2f} [{rho['low']:+.2f}, {rho['high']:+.2f}] p = {rho['p_value']:.3f}" in out
    assert (tmp_path / "out" / "eafo_losses.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("rank", "builtin:nano", "--activations", "nope"), "no activation 'nope'"),
        (("rank", "builtin:nano", "--losses", "/no/such/comparison"), "holds no comparison"),
        (("rank", "builtin:nano", "--plot"), "give --output_dir too"),
        (("rank", "builtin:nano", "--tokens", "0"), "--tokens must be 1 or more"),
        (("rank", "builtin:nano", "--epsilon", "nan"), "--epsilon must be a finite number"),
        (("rank", "/no/such/model"), "/no/such/model"),
        (
            ("fit", "builtin:nano", "--tokens", "64", "--samples", "7", "--output_dir", "here"),
            "--samples must be 100 or more",
        ),
    ],
)
def test_wrong_input_is_one_line(argv, words, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert eafo(*argv, "--data", text_file) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("crrelu eafo: ") and printed.err.count("\n") == 1
    assert words in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit", "rank"])
def test_help_has_a_real_example(command, capsys):
    with pytest.raises(SystemExit):
        eafo(command, "--help")
    assert f"example: crrelu eafo {command} " in capsys.readouterr().out


def test_fit_and_rank_on_images(tmp_path, capsys):
    from pictures import folder, save, vit

    model, data = save(vit(), tmp_path / "vit"), folder(tmp_path / "data", test=3)
    few = ("--data", data, "--images", "24", "--samples", "500")
    assert eafo("fit", model, *few, "--output_dir", tmp_path / "out", "--plot") == 0
    printed = capsys.readouterr()
    document = json.loads((tmp_path / "out" / "eafo_fit.json").read_text())
    assert document["images"] == 24 and "tokens" not in document and "on 24 images of" in printed.out
    # a class token and four patches an image, 24 channels
    assert [site["count"] for site in document["sites"]] == [24 * 5 * 24] * 2
    assert "--calibration_images 24" in printed.err
    assert eafo("rank", model, *few, "--untrained", "--activations", "relu", "gelu", "--json") == 0
    ranked = json.loads(capsys.readouterr().out)
    assert ranked["images"] == 24 and [found["state"] for found in ranked["models"]] == ["pretrained", "untrained"]
    assert eafo("fit", model, "--output_dir", tmp_path / "none") == 2
    assert "an image model is calibrated on images" in capsys.readouterr().err
