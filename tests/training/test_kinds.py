"""Every kind of training: what TRL computes, ε learned beside it, its evaluation, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from runs import LORA, Workshop, losses, write_rows
from safetensors.torch import load_file
from scipy.special import expit

from crrelu_llm.cli.main import main
from crrelu_llm.comparison.arms import directory_name
from crrelu_llm.comparison.card import card
from crrelu_llm.data import load_dataset
from crrelu_llm.errors import InputError
from crrelu_llm.training.kinds import KINDS, all_kinds, kind_of

# What tests/training/test_runs.py does not train already; RLOO shares all but TRL's trainer with GRPO.
NEW = ("kto", "reward", "grpo", pytest.param("rloo", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, tiny_checkpoint):
    """A folder with data of every kind."""
    return Workshop(tmp_path_factory.mktemp("kinds"), tiny_checkpoint)


def trl_losses(workshop, kind, recipe):
    """The losses that TRL's own trainer logs with a recipe."""
    about = kind_of(kind)
    keys = {"model_name_or_path", "dataset_name", "activation", "calibration", "reward_funcs"}
    options = {key: value for key, value in recipe.items() if key not in keys}
    more = {}
    if "reward_funcs" in recipe:
        space = {}
        exec((workshop.folder / "rewards.py").read_text(), space)
        more["reward_funcs"] = [space["length"]]
    args = about.config(**options, model_init_kwargs={"dtype": "float32"})
    trained = next(cls for cls in about.trainer.__mro__ if cls.__module__.startswith("trl."))
    trainer = trained(
        model=recipe["model_name_or_path"],
        args=args,
        train_dataset=load_dataset(recipe["dataset_name"])["train"],
        **more,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["kto", "reward", "grpo", "rloo"])
def test_without_an_activation_it_is_trl_to_the_last_digit(kind, workshop):
    options = {"activation": None, "max_steps": 4}
    ours = workshop.run(kind, f"{kind}-ours", **options)
    recipe = workshop.values(kind, f"{kind}-theirs", **options)
    assert losses(ours) == trl_losses(workshop, kind, recipe) and len(losses(ours)) == 4


@pytest.mark.parametrize("kind", NEW)
def test_epsilon_is_trained_saved_and_loaded_again(kind, workshop):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    record = workshop.run(kind, f"{kind}-crrelu", epsilon_learning_rate=0.05)
    assert record["kind"] == kind and record["steps"] == 3
    moved = [abs(record["epsilon"][path] - start) for path, start in record["epsilon_start"].items()]
    assert all(change > 1e-4 for change in moved)
    directory = workshop.folder / f"{kind}-crrelu"
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    model = auto.from_pretrained(directory)
    found = {name.removesuffix(".epsilon"): p for name, p in model.named_parameters() if name.endswith("epsilon")}
    assert {path: value.item() for path, value in found.items()} == pytest.approx(record["epsilon"], abs=1e-7)
    assert f"model = {auto.__name__}.from_pretrained" in card(directory)
    assert ("text-classification" if kind == "reward" else "text-generation") in card(directory)
    if kind == "reward":
        head = load_file(directory / "model.safetensors")["score.weight"]
        assert torch.equal(model.score.weight, head) and head.shape[0] == 1


@pytest.mark.parametrize("kind", ["kto", "reward", "grpo"])
@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_an_adapter_has_epsilon_and_its_reference_has_not(kind, bits, workshop):
    """LoRA, and in 4 bits QLoRA: ε is trained in the adapter; switched off, the model is what it was."""
    options = LORA | {"epsilon_learning_rate": 0.05} | ({"load_in_4bit": True} if bits else {})
    if kind == "reward":  # TRL trains the head in bfloat16, where the base is in 4 bits
        options |= {"bf16": bool(bits)}
    name = f"{kind}-lora-{bits}"
    record = workshop.run(kind, name, **options)
    assert all(abs(record["epsilon"][path] - start) > 1e-4 for path, start in record["epsilon_start"].items())
    saved = load_file(workshop.folder / name / "adapter_model.safetensors")
    epsilons = {key: value for key, value in saved.items() if key.endswith("epsilon")}
    assert sorted(value.item() for value in epsilons.values()) == pytest.approx(sorted(record["epsilon"].values()))
    assert all(value.dtype == torch.float32 for value in epsilons.values())
    if kind == "reward":
        assert any("score" in key for key in saved)
    if kind == "kto":  # the reference is the model without its adapter: no answer has a reward before the first step
        assert losses(record)[0] == 0.5


def test_the_first_loss_of_kto_is_what_theory_says(workshop):
    """The reference has the policy's activation: no answer has a reward yet, and 1 − σ(0) is a half."""
    record = workshop.run("kto", "kto-first", max_steps=1)
    assert losses(record) == [0.5]


@pytest.mark.parametrize("kind", NEW)
def test_a_resumed_training_is_the_one_that_was_not_stopped(kind, workshop):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = workshop.run(kind, f"{kind}-whole", **options)
    directory = workshop.folder / f"{kind}-again"
    (workshop.folder / f"{kind}-whole").rename(directory)
    for part in ("checkpoint-4", "run.json", "model.safetensors"):
        path = directory / part
        __import__("shutil").rmtree(path) if path.is_dir() else path.unlink()
    again = workshop.run(kind, f"{kind}-again", resume_from_checkpoint="auto", **options)
    assert again["resumed"] and losses(again)[-2:] == losses(whole)[-2:] and again["epsilon"] == whole["epsilon"]


def test_evaluating_kto(workshop):
    """Against the definition: rewards by hand, the divergence once over all answers."""
    recipe, trainer = workshop.trainer("kto", "kto-eval", learning_rate=1e-2, beta=0.5)
    before, items = recipe.kind.evaluate(trainer)
    assert before["loss"] == pytest.approx(0.5, abs=1e-6) and items["answer_accuracy"] == [0.5] * 8
    trainer.train()
    metrics, items = recipe.kind.evaluate(trainer)

    def log_probability(model, prompt, answer):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            values = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        return values.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()

    def ratio(prompt, answer):
        model = trainer.model.eval()
        return log_probability(model, prompt, answer) - log_probability(trainer.ref_model, prompt, answer)

    rows = list(trainer.eval_dataset)
    rewards = np.array([0.5 * ratio(row["prompt_ids"], row["completion_ids"]) for row in rows])
    answers = [row["completion_ids"] for row in rows]
    others = [answers[-1], *answers[:-1]]
    base = 0.5 * max(0.0, np.mean([ratio(row["prompt_ids"], other) for row, other in zip(rows, others, strict=True)]))
    wanted = np.array([row["label"] for row in rows])
    gains = np.where(wanted, rewards - base, base - rewards)
    assert items["loss"] == pytest.approx(expit(-gains).tolist(), abs=1e-5)
    assert metrics["reward_margin"] == pytest.approx(rewards[wanted].mean() - rewards[~wanted].mean(), abs=1e-5)
    assert np.mean(items["reward_margin"]) == pytest.approx(metrics["reward_margin"])
    assert items["answer_accuracy"] == [1.0 if gain > 0 else 0.0 for gain in gains]
    shown = recipe.kind.texts(trainer)
    assert len(shown) == 8 and all(len(entry.options) == 1 for entry in shown)
    assert [entry.right for entry in shown] == [[bool(label)] for label in wanted]


def test_the_answers_to_one_prompt_are_one_item(workshop):
    recipe, trainer = workshop.trainer("kto", "kto-pairs-eval", dataset_name=workshop.data("dpo"), learning_rate=1e-2)
    trainer.train()
    metrics, items = recipe.kind.evaluate(trainer)
    assert len(trainer.eval_dataset) == 16 and {len(values) for values in items.values()} == {8}
    assert all(np.mean(items[name]) == pytest.approx(metrics[name]) for name in items)
    shown = recipe.kind.texts(trainer)
    assert [entry.right for entry in shown] == [[True, False]] * 8


def test_the_seeds_of_a_comparison_by_kto_are_trainings_anew(workshop):
    """TRL takes the rows in their order, and of pairs first every chosen answer."""
    pairs = load_dataset(workshop.data("dpo"))["train"]
    first, second = (kind_of("kto").drawn(pairs, seed) for seed in (0, 1))
    assert len(first) == len(second) == 32 and first["completion"] != second["completion"]
    assert len(set(first["label"][:8])) == 2
    assert sorted(first["completion"]) == sorted(second["completion"])


def test_training_kto_on_answers_of_one_kind_alone_is_said(workshop, caplog):
    workshop.run("kto", "kto-one-kind", dataset_name=workshop.data("dpo"), max_steps=1)
    assert "are all desirable or all undesirable" in caplog.text


def test_evaluating_a_reward_model(workshop):
    recipe, trainer = workshop.trainer("reward", "reward-eval")
    metrics, items = recipe.kind.evaluate(trainer)

    def score(ids):
        with torch.no_grad():
            return trainer.model.eval()(input_ids=torch.tensor([ids])).logits.item()

    rows = list(trainer.eval_dataset)
    margins = [score(row["chosen_ids"]) - score(row["rejected_ids"]) for row in rows]
    assert items["reward_margin"] == pytest.approx(margins, abs=1e-5)
    assert items["loss"] == pytest.approx([math.log1p(math.exp(-margin)) for margin in margins], abs=1e-5)
    assert metrics["reward_accuracy"] == np.mean([margin > 0 for margin in margins])
    assert metrics["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
    shown = recipe.kind.texts(trainer)
    assert all(entry.options[0] != entry.options[1] for entry in shown) and len(shown) == 8


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_evaluating_sampled_answers(kind, workshop):
    recipe, trainer = workshop.trainer(kind, f"{kind}-eval", learning_rate=0.1)
    first = recipe.kind.evaluate(trainer)
    assert first == recipe.kind.evaluate(trainer), "greedy answers are the same again"
    assert first[0].get("kl", 0.0) == pytest.approx(0.0, abs=1e-6)
    answers = []
    for row in trainer.eval_dataset:
        ids = torch.tensor([trainer.processing_class(row["prompt"])["input_ids"]])
        with torch.no_grad():
            made = trainer.model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6
            )
        answers.append(trainer.processing_class.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert first[1]["reward"] == pytest.approx([len(answer) / 10 for answer in answers])
    trainer.train()
    metrics, items = recipe.kind.evaluate(trainer)
    assert metrics["reward"] == pytest.approx(np.mean(items["reward"])) and len(items["reward"]) == 8
    assert not trainer._metrics["eval"]
    if kind == "grpo":
        assert metrics["kl"] != 0.0


def test_the_generating_copy_has_the_new_epsilon(workshop):
    """After a step, answers are sampled by the model as it is then."""
    _, trainer = workshop.trainer("grpo", "grpo-generates", epsilon_learning_rate=0.5, learning_rate=1e-9)
    seen, generates = [], []
    generate = trainer._generate

    def watch(prompts):
        generates.append(True)
        seen.append([])
        try:
            return generate(prompts)
        finally:
            generates.pop()

    def note(module, args, output):
        if generates:
            seen[-1].append(module.epsilon.item())

    trainer._generate = watch
    site = next(module for module in trainer.model.modules() if hasattr(module, "epsilon"))
    site.register_forward_hook(note)
    trainer.train()
    assert [len(set(values)) for values in seen] == [1, 1, 1], (
        "one value while it writes, and it was the site that wrote"
    )
    assert len({values[0] for values in seen}) == 3


@pytest.mark.parametrize("kind", NEW)
def test_a_comparison_has_a_report(kind, workshop):
    values = workshop.values(kind, "unused", max_steps=2)
    for key in ("activation", "output_dir", "seed"):
        del values[key]
    from runs import write_recipe

    path = write_recipe(workshop.folder / f"compare-{kind}.yaml", values)
    out = workshop.folder / f"{kind}-comparison"
    argv = ["compare", kind, "--config", path, "--arms", "native", "relu", "--seeds", "0", "1", "--discard_models"]
    assert main([*argv, "--output_dir", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    about = kind_of(kind)
    assert report["trainer_label"] == about.label and report["items"] == about.items
    found = {(entry["metric"], entry["unit"]) for entry in report["comparisons"] if entry["candidate"] == "relu"}
    assert {(about.headline, unit) for unit in ("seed", "item", "both")} <= found
    assert all(entry["p_value"] is not None for entry in report["comparisons"] if entry["metric"] == about.headline)
    assert about.headline in report["arms"][0]["before"] and report["verdict"]
    starts = {path.read_text() for path in (out / "native").glob("seed-*/before.json")}
    assert len(starts) == (2 if kind == "reward" else 0), "a new head is each seed's own"
    page = (out / "report.html").read_text()
    assert about.items in page and about.label in page
    native, relu = (arm["runs"][0] for arm in report["arms"])
    for when in ("sparsity_before", "sparsity"):
        assert min(relu[when]["zeros"].values()) > 0.2 and max(native[when]["zeros"].values()) < 0.01
    assert "Zeros after the activations" in page
    assert (out / directory_name("relu") / "patched").is_dir()


def test_every_kind_says_what_it_is():
    assert [kind.name for kind in all_kinds()] == list(KINDS)
    for kind in all_kinds():
        assert kind.example.startswith(f"crrelu {kind.name} ") and kind.items and kind.needs
    with pytest.raises(KeyError):
        kind_of("ppo")


@pytest.mark.parametrize(
    ("kind", "other", "words"),
    [
        ("dpo", "sft", "dpo needs the columns chosen and rejected (and prompt), not text; crrelu sft takes these"),
        ("reward", "kto", "not prompt, completion, label; crrelu sft or kto or grpo or rloo takes these"),
        ("kto", "sft", "not text; crrelu sft takes these"),
        ("grpo", "sft", "not text; crrelu sft takes these"),
    ],
)
def test_the_columns_of_another_trainer_name_it(kind, other, words, workshop):
    with pytest.raises(InputError, match="needs") as caught:
        workshop.run(kind, f"{kind}-{other}", dataset_name=workshop.data(other))
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["sft", "kto", "reward", "grpo"])
def test_preference_pairs_are_taken_by_every_trainer(kind, workshop):
    record = workshop.run(kind, f"{kind}-pairs", dataset_name=workshop.data("dpo"), max_steps=1)
    assert record["status"] == "done" and math.isfinite(losses(record)[0])


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_shp_is_taken_as_it_was_published(kind, workshop, tmp_path):
    row = {"history": "Why?", "labels": 1, "post_id": "x", "score_A": 3}
    rows = [row | {"human_ref_A": f"Because {i}.", "human_ref_B": "No idea."} for i in range(8)]
    folder = tmp_path / "shp"
    for name in ("train", "test"):
        write_rows(folder / f"{name}.jsonl", rows)
    record = workshop.run(kind, f"{kind}-shp", dataset_name=str(folder), max_steps=1)
    assert record["status"] == "done"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rewards.py:fails", "the reward function fails failed: KeyError: 'answer'"),
        ("rewards.py:asks_in_vain", "the reward function asks_in_vain failed: KeyError: 'answer'"),
        (
            "rewards.py:not_a_number",
            "the reward function not_a_number returned nan for answer 1; return a finite number",
        ),
        ("rewards.py:too_few", "the reward function too_few returned 1 rewards for 2 answers; return one for each"),
        ("rewards.py:nothing", "the reward function nothing returned None for 2 answers; return one for each"),
        ("rewards.py:absent", "rewards has no function absent"),
        ("nowhere.py:length", "no such file"),
        ("lenght", "no such function"),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_named_before_any_training(name, words, workshop):
    with pytest.raises(InputError) as caught:
        workshop.run("grpo", "grpo-bad", reward_funcs=[name])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (workshop.folder / "grpo-bad" / "run.json").exists()


def test_a_training_without_rewards_is_refused(workshop):
    with pytest.raises(InputError, match="reward_funcs is missing: accuracy_reward"):
        workshop.run("grpo", "grpo-none", reward_funcs=None)


def test_trls_own_rewards_are_known_by_name(workshop):
    record = workshop.run("grpo", "grpo-named", reward_funcs=["get_soft_overlong_punishment"], max_steps=1)
    assert record["status"] == "done"


def test_a_reward_function_may_be_asynchronous_and_import_what_lies_beside_it(workshop):
    record = workshop.run("grpo", "grpo-asks", reward_funcs=["rewards.py:asks"], max_steps=1)
    assert record["history"][0]["reward"] > 0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_checkpoint):
    """A checkpoint with a trained head of one number."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("classifier")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=1)
    model.config.pad_token_id = 0
    with torch.no_grad():
        model.score.weight.fill_(0.25)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    return folder


def test_a_patched_reward_model_keeps_its_head(classifier, tmp_path):
    argv = ["patch", str(classifier), "--calibration_tokens", "1024", "--output_dir", str(tmp_path / "patched")]
    assert main(argv) == 0
    assert (load_file(tmp_path / "patched" / "model.safetensors")["score.weight"] == 0.25).all()
    report = json.loads((tmp_path / "patched" / "patch_report.json").read_text())
    assert report["perplexity"] is None and all(site["kept"] == "fit" for site in report["sites"])
    readme = (tmp_path / "patched" / "README.md").read_text()
    assert "`AutoModelForSequenceClassification.from_pretrained" in readme and "vllm" not in readme


def test_a_reward_model_is_trained_on(classifier, workshop):
    workshop.run("reward", "reward-on", model_name_or_path=str(classifier), max_steps=1, learning_rate=1e-9)
    head = load_file(workshop.folder / "reward-on" / "model.safetensors")["score.weight"]
    assert head == pytest.approx(0.25 * torch.ones_like(head), abs=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_model_without_a_language_models_head_is_refused(kind, classifier, workshop):
    with pytest.raises(InputError, match=f"without a head that predicts tokens, which {kind} trains"):
        workshop.run(kind, f"{kind}-headless", model_name_or_path=str(classifier))


def test_a_family_without_a_classifier_cannot_be_a_reward_model(tmp_path):
    from types import SimpleNamespace

    from transformers import AutoConfig

    from crrelu_llm.training.preflight import check_model

    AutoConfig.for_model("gpt_neox_japanese", hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    options = SimpleNamespace(model_name_or_path=str(tmp_path), attn_implementation=None)
    recipe = SimpleNamespace(model=options, kind=kind_of("reward"), source="R.yaml", loading={})
    with pytest.raises(InputError, match="gpt_neox_japanese has no sequence classifier in transformers"):
        check_model(recipe)


def test_rows_longer_than_the_positions_are_refused(workshop):
    """A GPT-2 has no more than its table: 64 here."""
    long = " ".join(["cat"] * 80)
    rows = {
        "kto": [{"prompt": "a", "completion": long, "label": i % 2 == 0} for i in range(8)],
        "reward": [{"chosen": long, "rejected": "no"} for _ in range(8)],
        "grpo": [{"prompt": long} for _ in range(8)],
    }
    for kind, content in rows.items():
        data = workshop.data(kind, train=content, test=content)
        with pytest.raises(InputError, match="tokens, but the model"):
            workshop.run(kind, f"{kind}-long", dataset_name=data, **({} if kind == "grpo" else {"max_length": 10_000}))


def test_a_label_that_is_none_is_refused(workshop):
    rows = [{"prompt": "a", "completion": " b", "label": label} for label in (True, False, -1)]
    with pytest.raises(InputError, match=r"row 3: label is -1; it must be true"):
        workshop.run("kto", "kto-labels", dataset_name=workshop.data("kto", train=rows, test=rows))


def test_transcripts_are_cut_before_the_last_answer():
    from datasets import Dataset

    from crrelu_llm.data.pairs import as_completions, as_prompts

    start = "\n\nHuman: Can I?\n\nAssistant: Maybe.\n\nHuman: Now?\n\nAssistant:"
    rows = Dataset.from_list([{"chosen": f"{start} Yes, you can.", "rejected": f"{start} Yes, never."}])
    assert as_completions(rows)[0] == {"prompt": start, "completion": " Yes, you can."}
    assert as_prompts(rows)[0] == {"prompt": start}


def test_a_gradual_swap_is_refused_where_answers_are_sampled(workshop):
    with pytest.raises(InputError, match="blend_steps is not for grpo, which samples its answers"):
        workshop.run("grpo", "grpo-blend", blend_steps=2)
