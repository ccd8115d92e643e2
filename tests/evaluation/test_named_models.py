"""Models of an evaluation: adapters that moved, that know more tokens, that fit another activation."""

import shutil

import pytest
import torch
from runs import LORA
from transformers import AutoTokenizer

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation import models
from crrelu_llm.evaluation.models import NamedModel

IDS = torch.arange(3, 35)[None]


def test_an_adapter_whose_run_was_moved(workshop):
    workshop.run("sft", "run", **LORA)
    with torch.no_grad():
        before = models.load(NamedModel("a", str(workshop.folder / "run")))(IDS).logits
        moved = shutil.move(workshop.folder / "run", workshop.folder / "moved")
        assert NamedModel("a", str(moved)).base == str(moved / "patched")
        assert torch.equal(models.load(NamedModel("a", str(moved)))(IDS).logits, before)


def test_an_adapter_with_a_cloned_chat_template(workshop, tiny_llama_checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_checkpoint)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "template")
    workshop.model = str(tiny_llama_checkpoint)
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "walks"}]
    data = workshop.data("sft", train=[{"messages": talk}] * 8, test=[{"messages": talk}] * 2)
    options = LORA | {"chat_template_path": str(tmp_path / "template"), "dataset_name": data, "save_strategy": "no"}
    _, trainer = workshop.trainer("sft", "run", **options)
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        ids = torch.arange(3, trainer.model.get_input_embeddings().weight.shape[0])[None, -40:]
        loaded = models.load(NamedModel("a", str(workshop.folder / "run")))
        assert torch.allclose(loaded(ids).logits[..., :400], trainer.model.eval()(ids).logits[..., :400], atol=1e-5)


def test_an_adapter_of_activations_that_are_not_calibrated(workshop, tmp_path):
    workshop.run("sft", "plain", **LORA)
    options = {"calibration": "fit", "calibration_tokens": 512, "affine_learning_rate": 1e-3}
    workshop.run("sft", "calibrated", **LORA, **options)
    adapter = shutil.copytree(
        workshop.folder / "plain", tmp_path / "adapter", ignore=shutil.ignore_patterns("patched")
    )
    config = adapter / "adapter_config.json"
    names = [str(workshop.folder / name / "patched") for name in ("plain", "calibrated")]
    config.write_text(config.read_text().replace(*names))
    with pytest.raises(
        InputError, match="the model's activations are calibrated, but those that the adapter was trained with"
    ):
        models.load(NamedModel("a", str(adapter)))


@pytest.mark.parametrize("base", ["HuggingFaceTB/SmolLM2-135M", "base", "/nowhere/model"])
def test_another_base_is_never_replaced(tmp_path, base):
    (tmp_path / "patched").mkdir()
    (tmp_path / "patched/config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}')
    assert NamedModel("a", str(tmp_path)).base == base


@pytest.mark.parametrize("config", ['{"peft_type": "NOPE"}', '{"peft_type": "LORA", "r": "eight"}'])
def test_an_adapter_that_peft_does_not_know(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(InputError, match="save the adapter again"):
        models.require_adapter(NamedModel("a", str(tmp_path)))
