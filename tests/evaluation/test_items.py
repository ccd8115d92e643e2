"""Evaluation with a value for every item: equal to TRL's own numbers, whatever the batches and references."""

import math

import numpy as np
import pytest
import torch
from runs import LORA, dpo_rows, kto_rows, losses, sft_rows
from transformers import AutoModelForCausalLM

from crrelu_llm.evaluation.items import evaluate_dpo, evaluate_sft
from crrelu_llm.evaluation.unpaired import by_prompt, margins
from crrelu_llm.training.kinds import kind_of
from crrelu_llm.training.run import train_and_save

DPO_OPTIONS = {
    "full": {},
    "lora": LORA,
    "precomputed": {"precompute_ref_log_probs": True},
    "lora, precomputed": LORA | {"precompute_ref_log_probs": True},
}

FLATTENED = {
    "packed": {"packing": True, "packing_strategy": "bfd", "eval_packing": True},
    "flattened": {"padding_free": True, "max_length": None},
}


def trained(workshop, kind, name="run", **options):
    """A trainer after three steps."""
    recipe, trainer = workshop.trainer(kind, name, **options)
    train_and_save(trainer, recipe)
    return trainer


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_sft_equals_trls_evaluation(workshop, options):
    trainer = trained(workshop, "sft", **options, per_device_eval_batch_size=8)  # one batch: TRL averages over batches
    metrics, items = evaluate_sft(trainer)
    theirs = trainer.evaluate()
    assert metrics["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(theirs["eval_mean_token_accuracy"], abs=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert {name: len(values) for name, values in items.items()} == dict.fromkeys(
        ("loss", "token_accuracy", "tokens"), 8
    )


def test_sft_items_are_the_documents_losses(workshop):
    trainer = trained(workshop, "sft")
    metrics, items = evaluate_sft(trainer)
    model = AutoModelForCausalLM.from_pretrained(workshop.folder / "run").eval()
    wanted, tokens, correct = [], [], []
    for row in sft_rows(8, seed=2):  # the test split
        ids = trainer.processing_class(row["text"])["input_ids"] + [trainer.processing_class.eos_token_id]
        ids = torch.tensor([ids[:48]])
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
        wanted.append(output.loss.item())
        tokens.append(ids.shape[1] - 1)
        correct.append((output.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum().item())
    np.testing.assert_allclose(items["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(items["token_accuracy"], np.divide(correct, tokens))
    assert metrics["loss"] == pytest.approx(np.average(wanted, weights=tokens), rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(sum(correct) / sum(tokens))


@pytest.mark.parametrize("options", [{}, FLATTENED["flattened"]], ids=["rows", "flattened"])
def test_the_loss_without_the_beginning_that_all_documents_share(workshop, options):
    rows = [{"text": f"A question: {row['text']}"} for row in sft_rows(8, seed=2, words=4)]
    trainer = workshop.trainer("sft", "run", **options, dataset_name=workshop.data("sft", test=rows))[1]
    metrics, _ = evaluate_sft(trainer)
    documents = trainer.eval_dataset["input_ids"]
    shared = next(i for i, tokens in enumerate(zip(*documents, strict=False)) if len(set(tokens)) > 1)
    assert shared > 2
    size = trainer.args.per_device_eval_batch_size if options else 1  # flattened documents see each other
    losses = []
    for group in (documents[i : i + size] for i in range(0, 8, size)):
        ids = torch.tensor([[token for document in group for token in document]])
        positions = torch.tensor([[i for document in group for i in range(len(document))]])
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits
        found = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        losses += found[positions[0, 1:] >= shared].tolist()
    assert len(losses) == sum(len(document) - shared for document in documents)
    assert metrics["loss_after_beginning"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_documents_without_a_common_beginning_have_no_loss_without_it(workshop):
    rows = [{"text": f"{row['text']} {word}"} for word, row in zip("ab", sft_rows(2, seed=2), strict=True)]
    rows[1]["text"] = rows[1]["text"][::-1]
    trainer = workshop.trainer("sft", "run", dataset_name=workshop.data("sft", test=rows))[1]
    assert "loss_after_beginning" not in evaluate_sft(trainer)[0]


def test_with_prompts_and_completions_the_completions_alone_count(workshop):
    sides = ("prompt", "completion")
    rows = {
        split: [{side: row[side] for side in sides} for row in kto_rows(8, seed)]
        for split, seed in (("train", 1), ("test", 2))
    }
    trainer = trained(workshop, "sft", dataset_name=workshop.data("sft", **rows))
    metrics, items = evaluate_sft(trainer)
    model = AutoModelForCausalLM.from_pretrained(workshop.folder / "run").eval()
    tokenizer, wanted, tokens = trainer.processing_class, [], []
    for row in rows["test"]:
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]])
        labels, prompt = ids.clone(), len(tokenizer(row["prompt"])["input_ids"])
        labels[:, :prompt] = -100
        with torch.no_grad():
            wanted.append(model(input_ids=ids, labels=labels).loss.item())
        tokens.append(ids.shape[1] - prompt)
    np.testing.assert_allclose(items["loss"], wanted, rtol=1e-5)
    assert metrics["loss"] == pytest.approx(np.average(wanted, weights=tokens), rel=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_batches_do_not_matter(workshop, kind):
    trainer = trained(workshop, kind)
    results = []
    for size in (1, 3, 4):
        trainer.args.per_device_eval_batch_size = size
        results.append(kind_of(kind).evaluate(trainer))
    (metrics, items), *others = results
    for other_metrics, other_items in others:
        assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)
        for name, values in items.items():
            np.testing.assert_allclose(other_items[name], values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", FLATTENED.values(), ids=FLATTENED)
def test_flattened_batches_are_split_by_document(workshop, options):
    """Documents that share a row; the model sees their boundaries only with flash attention, the items always do."""
    data = workshop.data("sft", test=sft_rows(8, seed=2, words=4))
    _, trainer = workshop.trainer("sft", "run", **options, dataset_name=data)
    rows = [row["seq_lengths"] if "seq_lengths" in row else [len(row["input_ids"])] for row in trainer.eval_dataset]
    assert sum(map(len, rows)) == 8
    metrics, items = evaluate_sft(trainer)
    assert {name: len(values) for name, values in items.items()} == dict.fromkeys(
        ("loss", "token_accuracy", "tokens"), 8
    )
    lengths = [length - 1 for row in rows for length in row]
    assert metrics["loss"] == pytest.approx(np.average(items["loss"], weights=lengths), rel=1e-6)
    assert metrics["token_accuracy"] == pytest.approx(np.average(items["token_accuracy"], weights=lengths))


@pytest.mark.parametrize("options", DPO_OPTIONS.values(), ids=DPO_OPTIONS)
def test_dpo_equals_trls_evaluation(workshop, options):
    trainer = trained(workshop, "dpo", **options)
    metrics, items = evaluate_dpo(trainer)
    theirs = trainer.evaluate()
    assert metrics["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert metrics["loss"] != pytest.approx(math.log(2), abs=1e-5)
    assert metrics["reward_margin"] == pytest.approx(theirs["eval_rewards/margins"], abs=1e-5)
    assert metrics["reward_accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"])
    assert {name: len(values) for name, values in items.items()} == dict.fromkeys(
        ("loss", "reward_accuracy", "reward_margin"), 8
    )
    for name, values in items.items():
        assert np.mean(values) == pytest.approx(metrics[name], rel=1e-6)


def test_dpo_items_by_hand(workshop):
    trainer = trained(workshop, "dpo", beta=0.3)
    metrics, items = evaluate_dpo(trainer)
    policy = AutoModelForCausalLM.from_pretrained(workshop.folder / "run").eval()
    reference = AutoModelForCausalLM.from_pretrained(workshop.folder / "run" / "patched").eval()
    tokenizer = trainer.processing_class
    margins, lengths, chosen = [], [], []
    for row in dpo_rows(8, seed=2):
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        scores = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]])[:, :48]
            with torch.no_grad():
                ours, base = (
                    model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[prompt - 1 :].sum()
                    for model in (policy, reference)
                )
            scores.append((ids.shape[1] - prompt, ours.item(), (ours - base).item()))
        margins.append(0.3 * (scores[0][2] - scores[1][2]))
        lengths.append((scores[0][0], scores[1][0]))
        chosen.append(scores[0][1])
    np.testing.assert_allclose(items["reward_margin"], margins, atol=1e-4)
    longer = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in lengths]
    assert metrics["longer_answer_accuracy"] == np.mean(longer)
    wanted = math.exp(-sum(chosen) / sum(length for length, _ in lengths))
    assert metrics["perplexity"] == pytest.approx(wanted, rel=1e-4)
    np.testing.assert_allclose(items["loss"], [math.log1p(math.exp(-margin)) for margin in margins], atol=1e-4)


def test_other_dpo_losses_come_from_trl(workshop):
    trainer = trained(workshop, "dpo", loss_type="ipo")
    metrics, items = evaluate_dpo(trainer)
    assert metrics["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert set(items) == {"reward_accuracy", "reward_margin"}


@pytest.mark.parametrize("options", [{"ld_alpha": 0.5}, {"ld_alpha": 0.5, "precompute_ref_log_probs": True}])
def test_rewards_weight_the_end_of_the_longer_answer_as_trl_does(workshop, options):
    _, trainer = workshop.trainer("dpo", "run", **options, per_device_eval_batch_size=8, learning_rate=1e-2)
    assert evaluate_dpo(trainer)[1]["reward_margin"] == pytest.approx([0.0] * 8, abs=1e-5)
    trainer.train()
    metrics, theirs = evaluate_dpo(trainer)[0], trainer.evaluate()
    assert metrics["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert metrics["reward_margin"] == pytest.approx(theirs["eval_rewards/margins"], rel=1e-4)


@pytest.mark.parametrize("options", [{"f_divergence_type": "js_divergence"}, {"loss_weights": [0.5]}])
def test_a_loss_that_is_not_plain_is_trls(workshop, options):
    trainer = trained(workshop, "dpo", **options, learning_rate=1e-2)
    metrics, items = evaluate_dpo(trainer)
    assert metrics["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert "loss" not in items


def test_every_document_is_evaluated_whatever_training_drops(workshop):
    options = {"dataloader_drop_last": True, "per_device_eval_batch_size": 3}
    trainer = workshop.trainer("sft", "run", **options)[1]
    assert len(evaluate_sft(trainer)[1]["loss"]) == 8 and trainer.args.dataloader_drop_last


def test_a_common_reward_is_no_margin():
    """One prompt with a desirable answer, one with three others, all with the same reward."""
    desirable = np.array([True, False, False, False])
    groups = [[0], [1, 2, 3]]
    assert margins(np.ones(4), desirable, groups) == [0.0, 0.0]
    assert np.mean(margins(np.array([3.0, 1.0, 1.0, 4.0]), desirable, groups)) == 1.0
    assert np.isnan(margins(np.ones(4), desirable | True, groups)).all()
    assert by_prompt({"loss": np.arange(4.0)}, groups) == {"loss": [0.0, 2.0]}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_evaluating_first_does_not_change_the_training(workshop, kind):
    plain = workshop.run(kind, "plain")
    recipe, trainer = workshop.trainer(kind, "measured")
    with torch.random.fork_rng():
        metrics, _ = kind_of(kind).evaluate(trainer)
    assert trainer.model.training == workshop.trainer(kind, "fresh")[1].model.training
    record = train_and_save(trainer, recipe, save_model=False, evaluate=lambda trained: {"before": metrics})
    assert losses(record) == losses(plain)
    assert record["epsilon"] == plain["epsilon"]
    assert record["before"] == metrics
    assert not (workshop.folder / "measured" / "model.safetensors").exists()


def test_items_are_in_the_order_of_the_data_whatever_the_sampler(workshop):
    """transformers would draw the evaluation rows by the training's strategy too, anew for each seed."""
    found = []
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 1}
    grouped = {"train_sampling_strategy": "group_by_length"}
    for options in ({}, grouped, grouped | workers):
        _, trainer = workshop.trainer("sft", f"order-{len(found)}", **options)
        if "max_steps" in options:
            trainer.evaluate()  # keeps its loader
        found.append(evaluate_sft(trainer)[1]["loss"])
    assert found[1:] == [pytest.approx(found[0], abs=1e-5)] * 2
