"""`crrelu patch` as a user runs it: report, table, perplexity, and every wrong input in one line."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny import logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from crrelu_llm.cli import main as command_line
from crrelu_llm.patching.calibration.tasks import SiteTask

SITE = {
    "path", "original", "num_channels", "epsilon_mean", "center", "width", "scale_mean", "relative_error",
    "relative_error_naive", "kept", "note",
}  # fmt: skip
REPORT = {
    "model", "model_type", "activation", "epsilon_per", "options", "sites", "skipped", "calibration", "perplexity",
    "seconds", "versions",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def crrelu_patch(*argv):
    """A plain swap, unless the options say otherwise: calibration reads text and takes seconds."""
    plain = () if "--calibration" in argv else ("--calibration", "none")
    return command_line.main(["patch", *map(str, argv), *plain])


def test_recompute_activation_is_kept_in_the_checkpoint(tiny_llama_checkpoint, tmp_path):
    out = tmp_path / "out"
    assert (
        crrelu_patch(tiny_llama_checkpoint, "--output_dir", out, "--perplexity_data", "none", "--recompute_activation")
        == 0
    )
    assert json.loads((out / "patch_report.json").read_text())["options"]["recompute_activation"] is True
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(layer.mlp.recomputes for layer in model.model.layers)


def test_a_fitted_density_is_in_the_report_the_table_and_the_checkpoint(
    tiny_llama_checkpoint, text_file, tmp_path, capsys
):
    out = tmp_path / "out"
    options = ["--density", "fitted", "--calibration_data", text_file, "--calibration_tokens", "256", "--plot"]
    assert crrelu_patch(tiny_llama_checkpoint, "--output_dir", out, *options, "--perplexity_data", "none") == 0
    report = json.loads((out / "patch_report.json").read_text())
    assert report["options"]["density"] == "fitted"
    model = AutoModelForCausalLM.from_pretrained(out)
    lines = capsys.readouterr().out.splitlines()[1:3]
    for site, layer, line in zip(report["sites"], model.model.layers, lines, strict=True):
        assert set(site) == SITE
        assert (site["center"], site["width"]) == (layer.mlp.act_fn.center.item(), layer.mlp.act_fn.width.item())
        assert f"  center {site['center']:+.3f}  width {site['width']:.3f}" in line
    assert command_line.main(["inspect", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "llama: 2 sites, patched to crrelu, density fitted"
    assert crrelu_patch(out, "--activation", "gelu", "--density", "fitted", "--output_dir", tmp_path / "no") == 2
    assert "density: fitted gives crrelu a centre and a width, and gelu has none" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_report_and_reload(tiny_llama_checkpoint, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--calibration", "fit", "--calibration_data", text_file, "--perplexity_data", text_file]
    assert crrelu_patch(tiny_llama_checkpoint, "--output_dir", out, *options, "--perplexity_tokens", "2100") == 0
    report = json.loads((out / "patch_report.json").read_text())
    assert set(report) == REPORT
    assert all(set(site) == SITE for site in report["sites"])
    assert [site["path"] for site in report["sites"]] == ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"]
    assert all(0 < site["relative_error"] < 1 for site in report["sites"])
    found = report["perplexity"]
    assert set(found) == {"before", "after_naive", "after", "tokens", "data"}
    assert found["after"] == pytest.approx(found["before"], rel=0.01)
    assert found["after_naive"] > 1.02 * found["before"]
    assert set(report["calibration"]) == {"seconds", "forward_seconds"}
    assert (found["tokens"], found["data"]) == (2048, str(text_file))  # whole blocks of 128
    model = AutoModelForCausalLM.from_pretrained(out)
    means = [layer.mlp.act_fn.epsilon.mean().item() for layer in model.model.layers]
    assert means == pytest.approx([site["epsilon_mean"] for site in report["sites"]])

    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "llama: 2 sites -> crrelu"
    assert lines[1].startswith("  model.layers.0.mlp.act_fn  silu  48 channels  epsilon ")
    assert lines[-1].startswith(f"perplexity on 2048 tokens of {text_file}: {found['before']:.2f} before, ")
    assert f"saved to {out}" in printed.err
    assert f"{text_file} has one split: perplexity is measured on the calibration text" in printed.err


def test_refit_keeps_the_model_and_the_picture_shows_it(tiny_llama_checkpoint, text_file, tmp_path):
    out = tmp_path / "out"
    options = ["--calibration", "refit", "--calibration_data", text_file, "--perplexity_data", text_file, "--plot"]
    assert crrelu_patch(tiny_llama_checkpoint, "--output_dir", out, *options) == 0
    found = json.loads((out / "patch_report.json").read_text())["perplexity"]
    assert found["after"] / found["before"] < 1.02 < found["after_naive"] / found["before"]
    picture = (out / "patch_report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert not list(out.glob(".*"))


class Stopped(BaseException):
    """Stands for a kill: no command catches it."""


def stopped(argv, monkeypatch):
    """Runs a command that ends when it comes to the second layer."""
    solve = SiteTask.solve

    def once(self, config):
        if ".1." in self.site.path:
            raise Stopped
        return solve(self, config)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(SiteTask, "solve", once)
        command_line.main([*map(str, argv)])


def killed(argv, monkeypatch):
    """The same in a process of its own, which kills itself."""
    code = (
        "import os, signal, sys\n"
        "from crrelu_llm.patching.calibration.tasks import SiteTask\n"
        "solve = SiteTask.solve\n"
        "def once(self, config):\n"
        "    if '.1.' in self.site.path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return solve(self, config)\n"
        "SiteTask.solve = once\n"
        "from crrelu_llm.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


# Default runs kill whole commands in training/test_crash.py.
@pytest.mark.parametrize("end", [stopped, pytest.param(killed, marks=pytest.mark.slow)])
def test_a_patch_that_is_killed_leaves_nothing_that_looks_finished(
    tiny_llama_checkpoint, text_file, tmp_path, monkeypatch, end
):
    out = tmp_path / "out"
    argv = ["patch", tiny_llama_checkpoint, "--output_dir", out, "--calibration", "refit"]
    argv += ["--calibration_data", text_file, "--perplexity_data", "none"]
    end(argv, monkeypatch)
    assert not out.exists()
    kept = sorted(path.name for path in (tmp_path / ".out.calibration").iterdir())
    assert kept == ["calibration.json", "layer-0000.safetensors"]
    assert crrelu_patch(*argv[1:]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "patch_report.json").is_file()


def test_a_full_disk_is_noticed_before_the_work(tiny_llama_checkpoint, text_file, tmp_path, capsys, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    argv = [tiny_llama_checkpoint, "--output_dir", tmp_path / "out", "--perplexity_data", text_file]
    assert "GiB free; choose another output_dir" in fails(capsys, tmp_path, *argv)


def test_a_broken_checkpoint_is_named_before_anything_is_written(tiny_llama_checkpoint, text_file, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    broken = tmp_path.parent / f"{tmp_path.name}-broken"
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(tiny_llama_checkpoint).save_pretrained(broken)
    for level in ("none", "refit"):
        argv = [broken, "--output_dir", tmp_path / "out", "--perplexity_data", text_file, "--calibration", level]
        message = fails(capsys, tmp_path, *argv, "--calibration_data", text_file)
        assert "model.layers.1.mlp.up_proj" in message and "not a number" in message


def test_the_current_directory_can_be_the_output(tiny_checkpoint, text_file, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ["--calibration", "none", "--perplexity_data", "none", "--plot"]
    assert crrelu_patch(tiny_checkpoint, "--output_dir", ".", *options) == 0
    assert (tmp_path / "here" / "patch_report.json").is_file()
    assert (tmp_path / "here" / "patch_report.png").is_file()


def test_a_plain_patch_has_no_naive_perplexity(tiny_checkpoint, text_file, tmp_path, capsys):
    argv = ["--perplexity-data", text_file, "--perplexity-tokens=512", "--epsilon-per", "channel", "--json"]
    assert crrelu_patch(tiny_checkpoint, "--output-dir", tmp_path / "out", *argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out/patch_report.json").read_text())
    assert report["epsilon_per"] == "channel"
    assert report["perplexity"]["after_naive"] is None
    assert [site["relative_error"] for site in report["sites"]] == [None, None]


def test_no_perplexity(tiny_checkpoint, tmp_path, capsys):
    argv = ["--perplexity_data", "none", "--activation", "relu", "--dtype", "bfloat16"]
    assert crrelu_patch(tiny_checkpoint, "--output_dir", tmp_path / "out", *argv) == 0
    assert json.loads((tmp_path / "out/patch_report.json").read_text())["perplexity"] is None
    assert "perplexity" not in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_real_command(tiny_checkpoint, tmp_path, capsys):
    command = [sys.executable, "-m", "crrelu_llm", "patch", tiny_checkpoint, "--output_dir", tmp_path / "out"]
    command += ["--calibration", "none"]
    done = subprocess.run(
        [*command, "--perplexity_data", "none", "--epsilon_init", "0.2", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sites"][1]["epsilon_mean"] == pytest.approx(0.2)
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))).all()
    assert command_line.main([str(word) for word in command[3:]]) == 2
    again = capsys.readouterr()
    assert again.out == ""
    assert again.err == f"crrelu patch: {tmp_path / 'out'} already exists; choose another --output_dir\n"


def fails(capsys, directory, *argv):
    """Runs a command that must fail without a trace on disk; returns its line on stderr."""
    before = sorted(directory.rglob("*"))
    assert crrelu_patch(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("crrelu patch: ")]
    assert len(lines) == 1
    assert "Traceback" not in printed.err
    assert sorted(directory.rglob("*")) == before
    return lines[0]


def test_an_output_dir_that_holds_something(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file", "full/mine.txt"):
        error = fails(capsys, tmp_path, tiny_checkpoint, "--output_dir", tmp_path / name)
        assert f"{name} already exists" in error


def test_an_output_dir_that_cannot_be(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    error = fails(capsys, tmp_path, tiny_checkpoint, "--output_dir", tmp_path / "file/out", "--perplexity_data=none")
    assert f"file/out: cannot write below {tmp_path / 'file'}" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--activation", "crelu"], "unknown activation 'crelu'; choose one of crrelu, gelu"),
        (["--epsilon_per", "neuron"], 'epsilon_per must be "layer" or "channel", not "neuron"'),
        (["--epsilon_init", "small"], "argument --epsilon_init: invalid float value: 'small'"),
        (["--epsilon_init", "nan"], "epsilon_init must be a finite number, not nan"),
        (["--calibration", "magic"], 'calibration must be "none", "fit" or "refit", not "magic"'),
        (["--calibration_tokens", "1.5"], "argument --calibration_tokens: invalid int value: '1.5'"),
        (["--calibration_tokens", "-3"], "calibration_tokens must be positive, not -3"),
        (["--perplexity_tokens", "1"], "--perplexity_tokens must be 2 or more, not 1"),
        (["--perplexity_data", "no/such/text.txt"], "no/such/text.txt: no such file"),
        (["--calibration", "fit", "--calibration_data", "builtin:poems"], "builtin:poems: no such built-in data set"),
        (["--epsilon_pre", "layer"], "unrecognized arguments: --epsilon_pre layer"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_wrong_options(argv, words, tiny_checkpoint, text_file, tmp_path, capsys):
    if "--perplexity_data" not in argv:
        argv = ["--perplexity_data", text_file, *argv]
    assert words in fails(capsys, tmp_path, tiny_checkpoint, "--output_dir", tmp_path / "out", *argv)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("weights/missing.gguf", "no such file: weights/missing.gguf"),
        ("./missing", "no such directory: ./missing"),
        ("builtin:huge", "unknown model builtin:huge"),
        ("nobody/no-such-model", "nobody/no-such-model: cannot be loaded"),
    ],
)
def test_wrong_models(model, words, tmp_path, capsys):
    assert words in fails(capsys, tmp_path, model, "--output_dir", tmp_path / "out")


def test_a_patched_checkpoint(tiny_checkpoint, tmp_path, capsys):
    argv = ["--perplexity_data", "none"]
    assert crrelu_patch(tiny_checkpoint, "--output_dir", tmp_path / "one", *argv) == 0
    capsys.readouterr()
    error = fails(capsys, tmp_path, tmp_path / "one", "--output_dir", tmp_path / "two", *argv)
    assert "is already patched to crrelu" in error


def test_the_way_back_is_a_plain_checkpoint_and_says_what_it_costs(tiny_llama_checkpoint, text_file, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    measured = ["--perplexity_data", text_file, "--perplexity_tokens", "256"]
    assert crrelu_patch(tiny_llama_checkpoint, "--output_dir", there, *measured) == 0
    assert crrelu_patch(there, "--activation", "silu", "--output_dir", back, *measured) == 0
    before, found = (json.loads((path / "patch_report.json").read_text())["perplexity"] for path in (there, back))
    assert found["patched"] == before["after"]
    assert found["before"] == found["after"] == before["before"]
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"{before['after']:.2f} as it was patched" in line
    original, plain = (load_file(path / "model.safetensors") for path in (tiny_llama_checkpoint, back))
    assert original.keys() == plain.keys() and all(torch.equal(plain[name], original[name]) for name in original)
