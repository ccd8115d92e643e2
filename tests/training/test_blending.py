"""The gradual swap in a run: steps, resume, what is saved and evaluated, and DPO's reference."""

import logging
import math

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from runs import LORA, Workshop, losses, trainers_and_methods
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from crrelu_llm.activation import CRReLU
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.items import evaluate_sft
from crrelu_llm.training.blending import BlendedReferenceMixin
from crrelu_llm.training.epsilon import epsilon_means
from crrelu_llm.training.run import train_and_save

SITES = ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
IDS = torch.arange(6, 30).view(2, 12)
LN2 = math.log(2)
BLEND = {"blend_steps": 4, "max_steps": 6}
SAVING = BLEND | {"save_strategy": "steps", "save_steps": 2}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def names(path):
    with safe_open(path, framework="pt") as file:
        return sorted(file.keys())


def weights(folder):
    """The bytes of the weights that a run saved."""
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    return {key: value.numpy().tobytes() for key, value in load_file(folder / name).items()}


def blends(record):
    """λ of every step, from the logs."""
    return [entry["blend"] for entry in record["history"] if "loss" in entry]


@trainers_and_methods
def test_lambda_goes_from_0_to_1_and_the_saved_model_is_pure(workshop, kind, options):
    recipe, trainer = workshop.trainer(kind, "run", **options, **SAVING)
    record = train_and_save(trainer, recipe)
    assert blends(record) == [0, 0.25, 0.5, 0.75, 1, 1]
    output, pure = workshop.folder / "run", workshop.run(kind, "pure", **options, max_steps=1)
    assert "blend" not in pure["history"][0]
    saved = "adapter_model.safetensors" if options else "model.safetensors"
    for folder in (output / "checkpoint-2", output / "checkpoint-6", output):
        assert names(folder / saved) == names(workshop.folder / "pure" / saved)
    reloaded = (AutoPeftModelForCausalLM if options else AutoModelForCausalLM).from_pretrained(output)
    assert torch.equal(logits(reloaded), logits(trainer.model))
    assert epsilon_means(reloaded) == record["epsilon"]
    assert all(abs(record["epsilon"][site] - 0.01) > 1e-6 for site in SITES)
    trained = logits(trainer.model)
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # the blend is over in training mode too
        assert torch.equal(trainer.model(input_ids=IDS).logits, trained)


@trainers_and_methods
def test_resuming_within_the_blend_repeats_the_tail(workshop, kind, options):
    options = options | SAVING | {"blend_schedule": "cosine"}
    whole = workshop.run(kind, "whole", **options)
    checkpoint = workshop.folder / "whole" / "checkpoint-2"
    again = workshop.run(kind, "again", **options, resume_from_checkpoint=str(checkpoint))
    assert blends(again)[-4:] == blends(whole)[-4:] == pytest.approx([0.5, 0.8535534, 1, 1])
    assert losses(again) == losses(whole)
    assert again["epsilon"] == whole["epsilon"]
    assert weights(workshop.folder / "again") == weights(workshop.folder / "whole")


@pytest.fixture(scope="module")
def native(tiny_checkpoint, tmp_path_factory):
    """One step of the model with its own activation."""
    return Workshop(tmp_path_factory.mktemp("native"), tiny_checkpoint).run(
        "sft", "native", activation=None, max_steps=1
    )


def test_the_first_step_is_the_original_model_s(workshop, native):
    blended = workshop.run("sft", "blended", blend_steps=3)
    swapped = workshop.run("sft", "swapped")
    assert losses(blended)[0] == losses(native)[0]
    assert abs(losses(swapped)[0] - losses(native)[0]) > 1e-5


def test_epsilon_waits_until_lambda_leaves_0(workshop):
    record = workshop.run("sft", "run", blend_steps=3, max_steps=3)
    steps = [entry[f"epsilon/{SITES[0]}"] for entry in record["history"] if "loss" in entry]
    assert steps[0] == pytest.approx(0.01, abs=1e-9)
    assert steps[1] != steps[0]


@pytest.mark.parametrize(
    ("arm", "calibration"), [("gelu", "none"), ("silu", "fit"), ("relu", "fit"), ("crrelu", "fit")]
)
def test_other_arms_are_treated_alike(workshop, native, text_file, arm, calibration):
    level = {"calibration": calibration, "calibration_tokens": 512, "calibration_data": str(text_file)}
    record = workshop.run("sft", "run", activation=arm, **BLEND, **level)
    assert blends(record) == [0, 0.25, 0.5, 0.75, 1, 1]
    assert losses(record)[0] == losses(native)[0]


def test_evaluation_is_of_what_would_be_saved(workshop):
    recipe, trainer = workshop.trainer(
        "sft", "run", **SAVING, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    before, _ = evaluate_sft(trainer)
    _, plain = workshop.trainer("sft", "plain")
    assert before == evaluate_sft(plain)[0]
    seen = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = logits(model)

    trainer.add_callback(Keep())
    train_and_save(trainer, recipe)
    assert sorted(seen) == [2, 4, 6]
    for step, found in seen.items():
        saved = AutoModelForCausalLM.from_pretrained(workshop.folder / "run" / f"checkpoint-{step}")
        assert torch.equal(logits(saved), found)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_gradient_checkpointing_changes_nothing(workshop, kind):
    plain, saving = (workshop.run(kind, f"{on}", gradient_checkpointing=on, **BLEND) for on in (False, True))
    np.testing.assert_allclose(losses(saving), losses(plain), atol=1e-5)
    assert saving["epsilon"] == pytest.approx(plain["epsilon"], abs=1e-6)


@pytest.mark.slow  # compiles: a minute or more of a busy core
def test_torch_compile_compiles_as_often_for_a_long_blend(workshop):
    counts, data = [], workshop.data("sft", train=[{"text": "the cat sees a tree"}] * 16)  # one shape
    for steps in (3, 6):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = workshop.run(
            "sft",
            f"compiled{steps}",
            **LORA,
            dataset_name=data,
            torch_compile=True,
            torch_compile_backend="eager",
            blend_steps=steps,
            max_steps=steps + 2,
        )
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] > 0
    torch._dynamo.reset()
    plain = workshop.run("sft", "plain", **LORA, dataset_name=data, blend_steps=6, max_steps=8)
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-5)


class TestReference:
    """DPO's reference under a blend is the model that training starts from."""

    @pytest.mark.parametrize(
        ("options", "precompute"),
        [
            pytest.param({}, False, id="full-reference"),
            pytest.param(LORA, True, id="lora-precomputed"),
            pytest.param(LORA | {"epsilon_learning_rate": 0}, False, id="frozen-reference"),
            pytest.param({"activation": "relu"}, True, id="relu-precomputed"),
            pytest.param({}, True, id="full-precomputed", marks=pytest.mark.slow),
            pytest.param(LORA, False, id="lora-reference", marks=pytest.mark.slow),
            pytest.param(LORA | {"epsilon_learning_rate": 0}, True, id="frozen-precomputed", marks=pytest.mark.slow),
            pytest.param({"activation": "relu"}, False, id="relu-reference", marks=pytest.mark.slow),
        ],
    )
    def test_the_first_loss_is_ln_2(self, workshop, options, precompute):
        options = options | {"precompute_ref_log_probs": precompute}
        record = workshop.run("dpo", "run", **options, **BLEND)
        assert losses(record)[0] == pytest.approx(LN2, abs=1e-6)
        assert losses(record)[-1] != pytest.approx(LN2, abs=1e-4)

    @pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
    def test_it_is_the_original_model_before_and_after(self, workshop, options):
        original = AutoModelForCausalLM.from_pretrained(workshop.model).eval()
        recipe, trainer = workshop.trainer("dpo", "run", **options, **BLEND)

        def reference():
            batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
            found = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))
            keep = batch["completion_mask"][:, 1:]
            with torch.no_grad():
                out = original(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            scores = out[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
            return found, (scores * keep).sum(1)

        for _ in range(2):
            torch.testing.assert_close(*reference(), atol=1e-5, rtol=1e-6)
            if trainer.state.global_step == 0:
                train_and_save(trainer, recipe)

    def test_arms_with_the_same_weights_do_not_share_what_trl_caches(self, workshop):
        arms = ({"activation": "gelu"}, {"activation": "relu"}, {"activation": "relu"} | BLEND)
        keys = set()
        for number, arm in enumerate(arms):
            _, trainer = workshop.trainer("dpo", str(number), **arm, precompute_ref_log_probs=True)
            keys.add(trainer._precompute_model_hash)
        assert len(keys) == 3

    def test_runs_on_the_same_rows_share_what_is_computed_in_advance(self, workshop, monkeypatch):
        calls = []
        whole = BlendedReferenceMixin.compute_ref_log_probs
        monkeypatch.setattr(
            BlendedReferenceMixin, "compute_ref_log_probs", lambda self, *args: calls.append(1) or whole(self, *args)
        )
        counts = []
        arms = {"a": {}, "b": {"seed": 7, "learning_rate": 0.1, "beta": 0.5}, "c": {"ld_alpha": 0.5}}
        for name, options in arms.items():
            more = {"activation": "gelu", "precompute_ref_log_probs": True, **options}
            workshop.run("dpo", f"shared-{name}", **more)
            counts.append(len(calls))
        assert counts[0] > 0 and counts[1] == counts[0] and counts[2] == 2 * counts[0]

    def test_computed_in_advance_or_not_is_the_same(self, workshop):
        options = LORA | BLEND
        once, always = (workshop.run("dpo", f"{on}", **options, precompute_ref_log_probs=on) for on in (True, False))
        np.testing.assert_allclose(losses(once), losses(always), atol=1e-5)


class TestMistakes:
    """One line, and nothing is trained."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"blend_steps": -1}, "blend_steps must be 0 or more, not -1"),
            ({"blend_steps": 4}, "blend_steps must be at most the number of training steps, 3, not 4"),
            ({"blend_steps": 2, "blend_schedule": "step"}, 'blend_schedule must be "linear" or "cosine", not "step"'),
            ({"blend_steps": 2, "activation": None}, "blend_steps needs an activation to blend to"),
            ({"blend_steps": 1.5}, "blend_steps must be a number (whole), not 1.5"),
        ],
    )
    def test_at_parse_time(self, workshop, options, message):
        with pytest.raises(InputError) as caught:
            workshop.run("sft", "run", **options)
        assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
        assert not (workshop.folder / "run").exists()

    def test_a_reference_that_follows_the_policy(self, workshop):
        with pytest.raises(InputError, match="sync_ref_model does not go with blend_steps"):
            workshop.run("dpo", "run", **BLEND, sync_ref_model=True)
        assert not (workshop.folder / "run").exists()

    def test_epochs_that_are_too_short(self, workshop):
        with pytest.raises(InputError, match="at most the number of training steps, 8, not 9"):
            workshop.run("sft", "run", blend_steps=9, max_steps=-1, num_train_epochs=1)
        assert not (workshop.folder / "run" / "model.safetensors").exists()

    def test_an_early_stop_is_said(self, workshop, caplog):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 2

        recipe, trainer = workshop.trainer("sft", "run", **BLEND)
        trainer.add_callback(Stop())
        with caplog.at_level(logging.WARNING, "crrelu_llm"):
            train_and_save(trainer, recipe)
        assert "training stopped after 2 of 4 blend_steps" in caplog.text
        saved = AutoModelForCausalLM.from_pretrained(workshop.folder / "run")
        assert type(saved.get_submodule(SITES[0])) is CRReLU
        assert torch.equal(logits(saved), logits(trainer.model))
