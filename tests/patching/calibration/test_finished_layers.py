"""A calibration that stops goes on at the layer that was not finished, and ends with the same bits."""

import json

import pytest
import torch
from tiny import tiny_model, token_ids

from crrelu_llm import PatchConfig, patch
from crrelu_llm.errors import InputError
from crrelu_llm.patching import transform
from crrelu_llm.patching.calibration import _Work, finished_layers
from crrelu_llm.patching.calibration.finished_layers import Progress, identity
from crrelu_llm.patching.calibration.tasks import SiteTask

BLOCKS = token_ids(8, 64, seed=3)
LAYERS = {"num_hidden_layers": 3, "n_layer": 3}


class Stopped(Exception):
    """Stands for a kill: nothing runs after it."""


@pytest.fixture
def solved(monkeypatch):
    """The paths of the sites that are calibrated, in order."""
    paths = []
    solve = SiteTask.solve

    def counted(self, config):
        paths.append(self.site.path)
        return solve(self, config)

    monkeypatch.setattr(SiteTask, "solve", counted)
    return paths


def stop_at(monkeypatch, layer):
    """Makes a calibration end when it comes to a layer."""
    on = _Work.on

    def stops(self, where, index, found):
        if index == layer:
            raise Stopped
        on(self, where, index, found)

    monkeypatch.setattr(_Work, "on", stops)


def same(first, second):
    """Whether two models have the same parameters, bit for bit."""
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "family, level, options, stop",
    [
        ("gpt2", "fit", {}, 1),
        ("gpt2", "refit", {"epsilon_per": "channel"}, 2),
        ("llama", "fit", {"activation": "prelu"}, 2),
        ("llama", "refit", {"activation": "relu"}, 1),
        ("phi3", "refit", {"epsilon_per": "channel"}, 2),
        ("mixtral", "fit", {"epsilon_per": "channel"}, 1),
        ("qwen2_moe", "refit", {"activation": "gelu"}, 2),
    ],
)
def test_the_rest_is_calibrated_and_the_bits_are_the_same(family, level, options, stop, solved, tmp_path, monkeypatch):
    config = PatchConfig(calibration=level, **options)
    whole = tiny_model(family, **LAYERS)
    report = patch(whole, config, blocks=BLOCKS)
    every, solved[:] = list(solved), []
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, stop)
        patch(tiny_model(family, **LAYERS), config, blocks=BLOCKS, progress=Progress(tmp_path / "kept", {}))
    before, solved[:] = list(solved), []
    assert Progress(tmp_path / "kept", {}).layers == stop and before
    again = tiny_model(family, **LAYERS)
    resumed = patch(again, config, blocks=BLOCKS, progress=Progress(tmp_path / "kept", {}))
    assert before + solved == every and solved
    assert same(again, whole)
    assert (resumed.sites, resumed.skipped) == (report.sites, report.skipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_kept_as_they_are(dtype, tmp_path, monkeypatch):
    config = PatchConfig("relu", calibration="refit")
    whole = tiny_model("llama", **LAYERS).to(dtype)
    patch(whole, config, blocks=BLOCKS)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, 2)
        kept = Progress(tmp_path / "kept", {})
        patch(tiny_model("llama", **LAYERS).to(dtype), config, blocks=BLOCKS, progress=kept)
    again = tiny_model("llama", **LAYERS).to(dtype)
    patch(again, config, blocks=BLOCKS, progress=Progress(tmp_path / "kept", {}))
    assert same(again, whole)


def test_what_a_damaged_layer_held_is_calibrated_again(solved, tmp_path, monkeypatch):
    config = PatchConfig("relu", calibration="refit")
    whole = tiny_model("gpt2", **LAYERS)
    patch(whole, config, blocks=BLOCKS)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, 2)
        patch(tiny_model("gpt2", **LAYERS), config, blocks=BLOCKS, progress=Progress(tmp_path / "kept", {}))
    file = tmp_path / "kept" / "layer-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    solved[:] = []
    again = tiny_model("gpt2", **LAYERS)
    patch(again, config, blocks=BLOCKS, progress=Progress(tmp_path / "kept", {}))
    assert len(solved) == 2
    assert same(again, whole)


def test_the_progress_of_another_calibration_is_removed(tmp_path):
    kept = Progress(tmp_path / "kept", {"text": 1})
    kept.save(0, {})
    assert kept.layers == kept.begin() == 1
    other = Progress(tmp_path / "kept", {"text": 2})
    assert other.layers == other.begin() == 0
    assert not (tmp_path / "kept").exists()


def test_what_decides_the_bits_decides_the_identity():
    cpu = torch.device("cpu")
    first = identity({"model": "m"}, BLOCKS, cpu)
    assert first == identity({"model": "m"}, BLOCKS.clone(), cpu)
    changed = BLOCKS.clone()
    changed[0, 0] += 1
    others = [identity({"model": "n"}, BLOCKS, cpu), identity({"model": "m"}, changed, cpu)]
    others += [
        identity({"model": "m"}, BLOCKS.view(4, 128), cpu),
        identity({"model": "m"}, BLOCKS, torch.device("meta")),
    ]
    assert first not in others
    json.dumps(first)


def files(directory):
    """The bytes of a checkpoint's files, but for the times that its report says."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    report = json.loads(found.pop("patch_report.json"))
    del report["seconds"], report["calibration"]  # what it took
    del found["README.md"]  # says what the directory is called
    return found, report


def test_a_checkpoint_that_was_stopped(tiny_checkpoint, text_file, solved, tmp_path, monkeypatch):
    config = PatchConfig("relu", calibration="refit", calibration_data=str(text_file), calibration_tokens=1024)
    transform.patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "whole")
    for error, layers in ((Stopped, 1), (KeyboardInterrupt, 1)):
        with monkeypatch.context() as patched, pytest.raises(error) as caught:
            if error is Stopped:
                stop_at(patched, 1)
            else:
                patched.setattr(SiteTask, "solve", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            transform.patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.calibration", "whole"]
        if error is KeyboardInterrupt:
            assert str(caught.value) == f"{layers} calibrated layers are kept; run the same command again to go on"
    solved[:] = []
    transform.patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
    assert solved == ["transformer.h.1.mlp.act"]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_another_text_begins_anew(tiny_checkpoint, text_file, solved, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    config = PatchConfig("relu", calibration="fit", calibration_data=str(text), calibration_tokens=512)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, 1)
        transform.patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
    text.write_text(text_file.read_text()[1000:])
    solved[:] = []
    transform.patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
    assert len(solved) == 2


def test_wrong_input_keeps_no_progress(tiny_checkpoint, text_file, tmp_path, monkeypatch):
    solve = SiteTask.solve

    def fails_in_the_second(self, config):
        if self.site.path == "transformer.h.1.mlp.act":
            raise InputError("not finite")
        return solve(self, config)

    monkeypatch.setattr(SiteTask, "solve", fails_in_the_second)
    config = PatchConfig("relu", calibration="fit", calibration_data=str(text_file), calibration_tokens=512)
    with pytest.raises(InputError, match="not finite"):
        transform.patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_finished_layers(tiny_checkpoint, text_file, tmp_path, monkeypatch):
    save = finished_layers.save_file
    config = PatchConfig("relu", calibration="fit", calibration_data=str(text_file), calibration_tokens=512)

    def full(tensors, path, **kwargs):
        if "layer-0001" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(transform.DiskError) as caught:
        patched.setattr(finished_layers, "save_file", full)
        transform.patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
    message = str(caught.value)
    assert "could not be written: no space left on device; 1 calibrated layers are kept; run the same" in message
    assert "\n" not in message
    kept = sorted(path.name for path in (tmp_path / ".out.calibration").iterdir())
    assert kept == ["calibration.json", "layer-0000.safetensors"]
    transform.patch_checkpoint(str(tiny_checkpoint), config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
