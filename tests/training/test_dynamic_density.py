"""Dynamic EAFO: what is counted of a training's pre-activations, and when and how centre and width follow it."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import LORA, losses, sft_rows
from safetensors.torch import load_file
from tiny import tiny_model, token_ids
from transformers import AutoModelForCausalLM, TrainerCallback

from crrelu_llm import PatchConfig, patch
from crrelu_llm.errors import InputError
from crrelu_llm.training.dynamic_density import MIN_WIDTH, DensityCallback, MomentTracker
from crrelu_llm.training.optimizer import epsilon_modules
from crrelu_llm.training.run import run_recipe, train_and_save

SITES = [f"model.layers.{layer}.mlp.act_fn" for layer in (0, 1)]
DENSITY = {"density": "fitted", "calibration_tokens": 256, "density_update_steps": 2, "density_momentum": 0.5}
SAVING = DENSITY | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture
def workshop(workshop, tiny_llama_checkpoint):
    """A `Workshop` with the tiny Llama, which has no dropout."""
    workshop.model = str(tiny_llama_checkpoint)
    return workshop


def fitted_model():
    """A tiny patched Llama in training mode, with a centre and a width of its own at every site."""
    model = tiny_model("llama")
    patch(model, PatchConfig("crrelu", epsilon_init=0.2, density="fitted"), blocks=token_ids())
    for shift, module in enumerate(epsilon_modules(model).values()):
        module.center.fill_(0.25 * shift)
        module.width.fill_(0.5)
    return model.train()


def densities(model):
    """Centre and width of every site."""
    return {path: (m.center.item(), m.width.item()) for path, m in epsilon_modules(model).items()}


def seen_by(model, **inputs):
    """What enters each site in a forward pass, `(batch, tokens, channels)`, float64."""
    kept, handles = {}, []
    for path, module in epsilon_modules(model).items():
        keep = lambda _, args, path=path: kept.__setitem__(path, args[0].detach().double().numpy())  # noqa: E731
        handles.append(module.register_forward_pre_hook(keep))
    model(**inputs)
    for handle in handles:
        handle.remove()
    return kept


def expected(values):
    """Count, Σx and Σx², by numpy."""
    return [values.size, values.sum(), np.square(values).sum()]


class TestCounting:
    """Which entries are summed."""

    def test_sums_are_those_of_the_tokens_that_the_mask_keeps(self):
        model, ids = fitted_model(), token_ids(3, 10)
        mask = torch.ones_like(ids)
        mask[0, 7:], mask[2, :4] = 0, 0
        tracker = MomentTracker(model)
        values = seen_by(model, input_ids=ids, attention_mask=mask)
        found = tracker.take().numpy()
        for row, path in zip(found, tracker.modules, strict=True):
            np.testing.assert_allclose(row, expected(values[path][mask.bool().numpy()]), rtol=1e-12)
        assert not tracker.take().any()

    def test_without_a_mask_every_token_counts_and_passes_add_up(self):
        model = fitted_model()
        tracker = MomentTracker(model)
        first, second = (seen_by(model, input_ids=token_ids(2, 9, seed)) for seed in (1, 2))
        for row, path in zip(tracker.take().numpy(), tracker.modules, strict=True):
            both = np.concatenate([first[path], second[path]])
            np.testing.assert_allclose(row, expected(both), rtol=1e-12)

    def test_evaluation_and_references_do_not_count(self):
        model = fitted_model()
        tracker = MomentTracker(model)
        with torch.no_grad():
            model(input_ids=token_ids())
        model.eval()(input_ids=token_ids())
        assert not tracker.take().any()
        tracker.remove()
        model.train()(input_ids=token_ids())
        assert not tracker.take().any()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_changes_no_mean(self, reentrant):
        means = []
        for saving in (False, True):
            model, ids = fitted_model(), token_ids(2, 10)
            mask = torch.ones_like(ids)
            mask[0, 6:] = 0
            if saving:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            tracker = MomentTracker(model)
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
            sums = tracker.take().numpy()
            means.append(sums[:, 1:] / sums[:, :1])
        np.testing.assert_allclose(*means, rtol=1e-12)

    def test_of_an_adapter_the_trained_copy_counts_alone(self):
        config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=SITES, task_type="CAUSAL_LM")
        model = get_peft_model(fitted_model(), config)
        tracker = MomentTracker(model)
        assert list(tracker.modules) == SITES
        with model.disable_adapter():
            model(input_ids=token_ids())
        assert not tracker.take().any()
        model(input_ids=token_ids())
        assert tracker.take()[:, 0].tolist() == [2 * 12 * 48] * 2


class TestUpdates:
    """When centre and width move, and where to."""

    def test_every_so_many_steps_to_the_running_moments(self, workshop):
        recipe, trainer = workshop.trainer("sft", "run", **DENSITY, max_steps=5)
        start, steps, batches = densities(trainer.model), {}, []

        class Keep(TrainerCallback):
            """Takes part after our callback, and sees the model's inputs by hooks of its own."""

            def on_step_end(self, args, state, control, model=None, **kwargs):
                steps[state.global_step] = densities(model)

        for path, module in epsilon_modules(trainer.model).items():
            module.register_forward_pre_hook(
                lambda _, args, path=path: batches.append((path, args[0].detach().double().numpy()))
            )
        masks = []
        trainer.model.model.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"].bool().numpy()), with_kwargs=True
        )
        trainer.add_callback(Keep())
        train_and_save(trainer, recipe)
        assert len(masks) == 5 and any(not mask.all() for mask in masks)
        for path, (center, width) in start.items():
            first, second = center, width**2 + center**2
            inputs = [values for site, values in batches if site == path]
            for step, (mask, values) in enumerate(zip(masks, inputs, strict=True), start=1):
                first = 0.5 * first + 0.5 * values[mask].mean()
                second = 0.5 * second + 0.5 * np.square(values[mask]).mean()
                if step % 2:
                    assert steps[step][path] == (steps[step - 1][path] if step > 1 else start[path])
                else:
                    assert steps[step][path] == pytest.approx((first, math.sqrt(second - first**2)), rel=1e-6)
                    assert steps[step][path] != steps[step - 1][path]

    def test_two_micro_batches_are_one_batch(self, workshop):
        data = workshop.data("sft", train=sft_rows(16, words=12))
        found = []
        for name, batch, accumulation in (("one", 4, 1), ("two", 2, 2)):
            options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            recipe, trainer = workshop.trainer("sft", name, **DENSITY | options, dataset_name=data, max_steps=4)
            train_and_save(trainer, recipe)
            found.append(densities(trainer.model))
        for path, pair in found[0].items():
            assert found[1][path] == pytest.approx(pair, rel=1e-5, abs=1e-6)

    def test_the_reference_of_dpo_keeps_its_density(self, workshop):
        options = DENSITY | LORA | {"epsilon_learning_rate": 0, "density_update_steps": 1}
        recipe, trainer = workshop.trainer("dpo", "run", **options)
        wrapped = {path: trainer.model.get_submodule(f"base_model.model.{path}") for path in SITES}
        before = {path: module.original_module.center.item() for path, module in wrapped.items()}
        assert losses(train_and_save(trainer, recipe))[0] == pytest.approx(math.log(2), abs=1e-6)
        for path, module in wrapped.items():
            assert module.original_module.center.item() == before[path]
            assert module.modules_to_save["default"].center.item() != before[path]

    def test_batches_that_are_not_finite_are_left_out(self, caplog):
        model = fitted_model()
        before, callback = densities(model), DensityCallback(steps=1, momentum=0.5)
        args = type("Args", (), {"device": torch.device("cpu"), "world_size": 1})
        state = type("State", (), {"global_step": 0, "stateful_callbacks": {}})
        callback.on_train_begin(args, state, None, model=model)
        second = epsilon_modules(model)[SITES[1]]
        for state.global_step in (1, 2):
            broken = second.register_forward_pre_hook(lambda _, found: (found[0] * math.nan, *found[1:]), prepend=True)
            model(input_ids=token_ids())
            broken.remove()
            with caplog.at_level(logging.WARNING, "crrelu_llm"):
                callback.on_step_end(args, state, None)
        after = densities(model)
        assert after[SITES[0]] != before[SITES[0]]
        assert after[SITES[1]] == pytest.approx(before[SITES[1]], rel=1e-6)
        assert caplog.text.count("not finite") == 1

    def test_a_density_without_a_width_has_the_least_one(self):
        model, callback = fitted_model(), DensityCallback(steps=1, momentum=0.0)
        args = type("Args", (), {"device": torch.device("cpu"), "world_size": 1})
        state = type("State", (), {"global_step": 1, "stateful_callbacks": {}})
        callback.on_train_begin(args, state, None, model=model)
        for module in epsilon_modules(model).values():
            module(torch.full((2, 3, 48), 0.75), torch.ones(2, 3, 48))
        callback.on_step_end(args, state, None)
        assert all(pair == pytest.approx((0.75, MIN_WIDTH)) for pair in densities(model).values())


class TestResume:
    """A resumed run is the uninterrupted one, bit for bit."""

    @pytest.mark.parametrize("options", [{}, LORA | {"density_momentum": 0.9}], ids=["full", "lora"])
    def test_losses_and_densities(self, workshop, options):
        whole = workshop.run("sft", "whole", **SAVING | options)
        checkpoint = workshop.folder / "whole" / "checkpoint-3"
        saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["DensityCallback"]
        assert list(saved["attributes"]["moments"]) == SITES
        again = workshop.run("sft", "again", **SAVING | options, resume_from_checkpoint=str(checkpoint))
        assert losses(again) == losses(whole)
        name = "adapter_model.safetensors" if "use_peft" in options else "model.safetensors"
        first, second = (load_file(workshop.folder / run / name) for run in ("whole", "again"))
        assert sum(key.endswith((".center", ".width")) for key in first) == 4
        assert all(torch.equal(first[key], second[key]) for key in first)
        tracked = [[entry["density/center"] for entry in run["history"] if "loss" in entry] for run in (whole, again)]
        assert tracked[0] == tracked[1] and len(set(tracked[0])) == 4  # the start, and after steps 2, 4 and 6
        centers = [value.item() for key, value in first.items() if key.endswith(".center")]
        assert tracked[0][-1] == pytest.approx(sum(centers) / 2, rel=1e-6)

    def test_off_by_default_and_from_a_run_that_did_not_track(self, workshop):
        options = DENSITY | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        plain = workshop.run("sft", "run", **options | {"density_update_steps": 0})
        assert not any("density/center" in entry for entry in plain["history"])
        patched, checkpoint = workshop.folder / "run" / "patched", workshop.folder / "run" / "checkpoint-1"
        assert "DensityCallback" not in (checkpoint / "trainer_state.json").read_text()
        workshop.run("sft", "again", **options, resume_from_checkpoint=str(checkpoint))
        start, stayed, moved = (
            densities(AutoModelForCausalLM.from_pretrained(folder))
            for folder in (patched, workshop.folder / "run", workshop.folder / "again")
        )
        assert start == stayed
        assert all(moved[path] != start[path] for path in SITES)


class TestMistakes:
    """One line, and nothing is trained."""

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("sft", {"density_update_steps": -1}, "density_update_steps must be 0 or more, not -1"),
            ("sft", {"density_update_steps": 1.5}, "density_update_steps must be a number (whole), not 1.5"),
            ("sft", {"density_momentum": 1.0}, "density_momentum must be in [0, 1), not 1.0"),
            ("sft", {"density_momentum": -0.1}, "density_momentum must be in [0, 1), not -0.1"),
            ("sft", {"density": "standard"}, "set density: fitted, or leave density_update_steps out"),
            ("sft", {"activation": "gelu"}, "density_update_steps needs activation: crrelu"),
            ("sft", {"activation": None}, "density_update_steps needs activation: crrelu"),
            ("sft", {"torch_compile": True}, "leave it or torch_compile out"),
            ("dpo", {"sync_ref_model": True}, "sync_ref_model does not go with density_update_steps"),
        ],
    )
    def test_at_parse_time(self, workshop, kind, options, message):
        with pytest.raises(InputError) as caught:
            run_recipe(kind, workshop.argv(kind, "run", **DENSITY | options))
        assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
        assert not (workshop.folder / "run").exists()
