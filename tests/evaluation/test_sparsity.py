"""The share of zeros after each activation: counted by hand, of patched and native models, adapters, and texts."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is an extra: eval")

from peft import LoraConfig, get_peft_model
from suite_data import language_model, sentence
from tiny import tiny_model, token_ids

from crrelu_llm import PatchConfig, patch
from crrelu_llm.evaluation.language_modelling import TextTask
from crrelu_llm.evaluation.sparsity import LONGEST, ROWS, TOKENS, Zeros, sparsity, sparsity_of_trainer
from crrelu_llm.report.schema import Sparsity

SITES = [f"model.layers.{layer}.mlp.act_fn" for layer in (0, 1)]
SEQUENCES = token_ids(3, 12).tolist()


def entered(model, sites):
    """What enters each site on `SEQUENCES`, `(tokens, channels)`."""
    kept = {path: [] for path in sites}
    for path in sites:
        model.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: kept[path].append(args[0]))
    with torch.no_grad():
        for ids in SEQUENCES:
            model(input_ids=torch.tensor([ids]))
    return {path: torch.cat([part[0] for part in parts]) for path, parts in kept.items()}


@pytest.mark.parametrize("activation", ["relu", "crrelu", None])
def test_shares_are_those_counted_by_hand(activation):
    model = tiny_model("llama")
    if activation is not None:
        patch(model, PatchConfig(activation, calibration="none"))
    found = sparsity(model, SEQUENCES)
    assert found.tokens == 36 and found.at_offset == {} and list(found.zeros) == SITES
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for path, x in entered(model, SITES).items():
        assert found.zeros[path] == pytest.approx((x <= 0).float().mean().item() if activation == "relu" else 0)
    assert activation != "relu" or 0.2 < found.zeros[SITES[0]] < 0.8


def test_what_is_too_small_for_a_number_is_a_zero_of_crrelu_too():
    model = tiny_model("llama")
    patch(model, PatchConfig("crrelu", calibration="none"))
    counted = Zeros(model)
    model.model.layers[0].mlp.act_fn(torch.tensor([[-20.0, -15.0, -3.0, 0.0]]), torch.ones(1, 4))  # gate and up
    assert counted.take().zeros == {SITES[0]: 0.75}


def test_a_calibrated_activation_is_at_its_offset_where_it_would_be_zero():
    model = tiny_model("llama")
    patch(model, PatchConfig("relu"), blocks=token_ids())
    found = sparsity(model, SEQUENCES)
    for path, x in entered(model, SITES).items():
        module = model.get_submodule(path)
        inactive = (module.scale * (x + module.shift) <= 0).float().mean().item()
        assert found.at_offset[path] == pytest.approx(inactive, abs=0.01) and inactive > 0.1
        assert found.zeros[path] < 0.5 * inactive


def test_layers_that_keep_their_activation_count_as_they_are():
    model = tiny_model("llama")
    patch(model, PatchConfig("relu", calibration="none", layers="1"))
    found = sparsity(model, SEQUENCES).zeros
    assert list(found) == SITES and found[SITES[0]] == 0 and found[SITES[1]] > 0.2


def test_of_an_adapter_the_trained_copy_counts():
    model = tiny_model("llama")
    patch(model, PatchConfig("crrelu", calibration="none"))
    whole = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=SITES, task_type="CAUSAL_LM")
    )
    copies = [m for name, m in whole.named_modules() if name.endswith("modules_to_save.default")]
    for copy in copies:
        copy.epsilon.data.fill_(0.0)  # ReLU
    assert all(share > 0.2 for share in sparsity(whole.eval(), SEQUENCES).zeros.values()) and len(copies) == 2


def test_a_small_part_of_the_data():
    model = tiny_model("gpt2")
    ids = [5] * 100
    assert sparsity(model, [ids] * 100).tokens == TOKENS
    assert sparsity(model, [[5]] * 100).tokens == ROWS
    assert sparsity(model, [ids * LONGEST]).tokens == min(LONGEST, model.config.n_positions)
    assert sparsity(model, []) == Sparsity()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_of_a_trainer_on_the_beginning_of_its_evaluation_data(workshop, kind):
    _, trainer = workshop.trainer(kind, "run", activation="relu")
    trainer.model.train()
    found = sparsity_of_trainer(trainer)
    assert trainer.model.training and len(found.zeros) == 2 and all(0.2 < x < 0.8 for x in found.zeros.values())
    rows = list(trainer.eval_dataset)
    whole = [row["input_ids"] if kind == "sft" else row["prompt_ids"] + row["chosen_ids"] for row in rows]
    assert found == sparsity(trainer.model.eval(), whole)
    if kind == "sft":  # of two documents in one row, the first
        trainer.eval_dataset = [{"input_ids": whole[0] + whole[1], "seq_lengths": [len(whole[0]), len(whole[1])]}]
        assert sparsity_of_trainer(trainer) == sparsity(trainer.model, whole[:1])


def test_of_a_text(tmp_path, tiny_llama_checkpoint, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(sentence(30, seed) for seed in range(4)))
    lm = language_model(tiny_llama_checkpoint)
    patch(lm.model, PatchConfig("relu", calibration="none"))
    found = TextTask("text", file, None).run(lm).sparsity
    assert found.tokens > 15 and all(0.2 < share < 0.8 for share in found.zeros.values())
