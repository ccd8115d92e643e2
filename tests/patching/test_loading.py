"""MODEL names and what is saved: whole or absent, and errors in one line."""

import json

import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig

from crrelu_llm import find_sites
from crrelu_llm.errors import InputError
from crrelu_llm.patching import loading


def test_save_is_whole_or_absent(tmp_path):
    class Broken(torch.nn.Module):
        def save_pretrained(self, directory):
            directory.mkdir()
            (directory / "model.safetensors").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        loading.save(Broken(), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_save_fills_an_empty_directory_and_writes_the_documents(tmp_path, tokenizer):
    (tmp_path / "deep" / "out").mkdir(parents=True)
    loading.save(tiny_model("llama"), tokenizer, tmp_path / "deep/out", {"note.json": {"a": 1}})
    assert json.loads((tmp_path / "deep/out/note.json").read_text()) == {"a": 1}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "deep/out").iterdir()
    }
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_skeleton_has_every_site_and_no_weights(tmp_path):
    AutoConfig.for_model("llama", num_hidden_layers=80, hidden_size=8192, intermediate_size=28672).save_pretrained(
        tmp_path
    )
    model = loading.skeleton(str(tmp_path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert [site.num_channels for site in find_sites(model)] == [28672] * 80


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("builtin:giant", "unknown model builtin:giant"),
        ("./no/such/model", "no such directory: ./no/such/model"),
        ("nowhere.gguf", "no such file: nowhere.gguf"),
        ("an/unknown-hub-name", "an/unknown-hub-name: cannot be loaded"),
    ],
)
def test_models_that_cannot_be_had(name, words):
    with pytest.raises(InputError) as caught:
        loading.load_model(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directories_that_are_no_model(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json in this directory"):
        loading.load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="an adapter: give its base model"):
        loading.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        loading.load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(InputError, match=r"a hub name, a directory or a \.gguf file"):
        loading.resolve(str(tmp_path / "weights.bin"))
