"""Preference pairs, text, and what all tasks share: numbers worked out by hand."""

import math

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is an extra: eval")

from suite_data import by_hand, language_model, pairs, sentence, write

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.language_modelling import TextTask, pieces
from crrelu_llm.evaluation.measured import Item, Measured, interval, linearised, spread_over_groups
from crrelu_llm.evaluation.preference import PreferenceTask, against_reference, render


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A data cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def file(tmp_path):
    """Preference pairs on disk."""
    return write(tmp_path / "pairs.jsonl.gz", pairs())


def test_pairs_by_hand(file, tiny_checkpoint, tokenizer):
    found = PreferenceTask("pairs", file, None, chat=False).run(language_model(tiny_checkpoint))
    for row, example in zip(pairs(), found.examples, strict=True):
        context = f"User: {row['prompt'][0]['content']}\n\nAssistant:"
        start = len(tokenizer(context)["input_ids"])
        logps = []
        for side in ("chosen", "rejected"):
            ids = tokenizer(f"{context} {row[side][0]['content']}<|end|>")["input_ids"]
            assert ids[-1] == tokenizer.eos_token_id
            logps.append((by_hand(tiny_checkpoint, ids, start), len(ids) - start))
        assert example.responses == pytest.approx([logp for logp, _ in logps], abs=1e-4)
        index = example.id
        (chosen, m), (rejected, n) = logps
        assert found.items["logp_accuracy"][index] == (chosen > rejected)
        assert found.items["logp_accuracy_norm"][index] == (chosen / m > rejected / n)
        assert found.items["logp_margin"][index] == pytest.approx(chosen - rejected, abs=1e-4)
    assert 0 < found.metrics["longer_answer_accuracy"] < 1


def test_pairs_do_not_depend_on_batches(file, tiny_llama_checkpoint):
    task = PreferenceTask("pairs", file, None, chat=True)
    one, seven = (task.run(language_model(tiny_llama_checkpoint, size)) for size in (1, 7))
    for first, second in zip(one.examples, seven.examples, strict=True):
        np.testing.assert_allclose(first.responses, second.responses, rtol=0, atol=1e-5)
        assert first.prompt.endswith("<|assistant|>") and first.options[0].endswith("<|end|>")


def test_rewards_against_a_reference():
    policy, reference = (
        Measured(
            metrics={},
            items={},
            examples=[Item(id=0, group="", prompt="", options=[], target="0", responses=pair) for pair in sides],
        )
        for sides in ([[-1.0, -4.0], [-3.0, -2.0]], [[-2.0, -3.0], [-2.0, -4.0]])
    )
    found = against_reference(policy, reference, beta=0.5)
    assert found.items["reward_margin"] == pytest.approx([0.5 * 2, 0.5 * -3])
    assert found.items["reward_accuracy"] == [1.0, 0.0]
    assert found.items["preference_loss"] == pytest.approx([math.log1p(math.exp(-1.0)), math.log1p(math.exp(1.5))])


def test_ways_of_writing_a_pair(tokenizer):
    messages = pairs(1)[0]
    strings = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    assert render(strings, tokenizer, False, "t") == ("ask", "yes<|end|>", "no<|end|>")
    assert render(strings, tokenizer, True, "t") == ("<|user|>ask<|assistant|>", "yes<|end|>", "no<|end|>")
    shared = {side: messages["prompt"] + messages[side] for side in ("chosen", "rejected")}
    for chat in (False, True):
        assert render(shared, tokenizer, chat, "t") == render(messages, tokenizer, chat, "t")
    for wrong in ({"chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "", "rejected": "b"}):
        with pytest.raises(InputError, match="a pair needs a prompt and two answers"):
            render(wrong, tokenizer, False, "t")


def test_long_pairs_are_cut_and_it_is_said(tmp_path, tiny_checkpoint):
    rows = [{"prompt": sentence(1, 200), "chosen": sentence(2), "rejected": sentence(3, 200)}]
    found = PreferenceTask("long", write(tmp_path / "p.jsonl", rows), None, False).run(language_model(tiny_checkpoint))
    assert found.notes == ["1 of 1 pairs are longer than the model's context and were truncated"]
    assert all(map(math.isfinite, found.examples[0].responses))


def test_pairs_without_their_columns(tmp_path):
    path = write(tmp_path / "p.jsonl.gz", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(InputError, match=r"no column rejected.*has prompt, chosen"):
        PreferenceTask("p", path, None, False)


def test_text_by_hand(tmp_path, tiny_checkpoint, tokenizer):
    texts = [sentence(i, 5 + 3 * i) for i in range(4)]
    task = TextTask("text", write(tmp_path / "text.jsonl.gz", [{"text": text} for text in texts]), None)
    found = task.run(language_model(tiny_checkpoint, 3))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    nll = [-by_hand(tiny_checkpoint, [tokenizer.bos_token_id, *row], 1) for row in ids]
    loss = sum(nll) / sum(map(len, ids))
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.metrics["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / sum(map(len, texts)), rel=1e-5)
    assert found.intervals["perplexity"][0] < found.metrics["perplexity"] < found.intervals["perplexity"][1]
    assert TextTask("text", tmp_path / "text.jsonl.gz", 2).rows == 2


def test_pieces_of_lines():
    lines = ["a" * 2000, "", "b" * 2000, "", "", "c"]
    assert [piece[0] + piece[-1] for piece in pieces(lines)] == ["ab", "cc"]
    assert len(list(pieces(["d" * 100] * 150))) == 3  # no empty lines: cut all the same
    assert list(pieces(["", " "])) == []


def test_linearised_values_stand_for_their_ratio():
    rng = np.random.default_rng(0)
    weights = rng.integers(10, 1000, 4000).astype(float)
    sums = weights * rng.normal(3, 0.5, 4000)
    values = np.array(linearised(sums, weights))
    ratio = sums.sum() / weights.sum()
    assert values.mean() == pytest.approx(ratio, rel=1e-12)
    picks = rng.integers(0, 4000, (2000, 4000))
    spread = np.std(sums[picks].sum(1) / weights[picks].sum(1))
    assert values.std() / np.sqrt(4000) == pytest.approx(spread, rel=0.1)


def test_intervals():
    low, high = interval([0.0, 2.0] * 200)
    assert low == pytest.approx(1 - 1.96 * 0.05, abs=0.02) and high == pytest.approx(1 + 1.96 * 0.05, abs=0.02)
    assert interval([2.0]) == (2.0, 2.0)
    measured = Measured(metrics={"loss": 1.0, "perplexity": math.e}, items={"loss": [0.5, 1.5]}).with_intervals()
    assert measured.intervals["perplexity"] == pytest.approx([math.exp(end) for end in measured.intervals["loss"]])


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 20), (20, 20), (7, 10), (600, 1000)])
def test_wilsons_interval_of_right_and_wrong(right, n):
    p, z = right / n, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert interval([1.0] * right + [0.0] * (n - right)) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_items_in_turn_from_each_group():
    assert spread_over_groups(["a", "a", "a", "b", "c", "c"], 4) == [0, 1, 3, 4]
    assert spread_over_groups(["a", "b"], 9) == [0, 1]


@pytest.mark.parametrize("adds", [True, False])
def test_text_is_scored_once_after_what_the_tokenizer_puts_before_it(tiny_checkpoint, tmp_path, adds):
    import shutil

    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = tokenizer.bos_token_id
    if adds:
        whole = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", start)])
        tokenizer.backend_tokenizer.post_processor = whole
        tokenizer.save_pretrained(model)
    texts = ["The cat walks over the stone.", "A red river."]
    path = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    found = TextTask("texts", path, None).run(language_model(model))
    plain = [
        AutoTokenizer.from_pretrained(tiny_checkpoint)(text, add_special_tokens=False).input_ids for text in texts
    ]
    total = -sum(by_hand(model, [start, *ids], 1) for ids in plain)
    assert found.metrics["loss"] == pytest.approx(total / sum(map(len, plain)), abs=1e-5)
    if adds:  # every window of a text that is longer than the context begins so
        found = TextTask("texts", path, None).run(language_model(model, max_length=4))
        windows = [[start, *ids[at : at + 4]] for ids in plain for at in range(0, len(ids), 4)]
        total = -sum(by_hand(model, window, 1) for window in windows)
        assert found.metrics["loss"] == pytest.approx(total / sum(map(len, plain)), abs=1e-5)


def test_a_pair_that_a_template_refuses_is_named_before_a_model_is_loaded(tokenizer, tmp_path):
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ raise_exception('no such role') }}"
    task = PreferenceTask("pairs", write(tmp_path / "pairs.jsonl", pairs()), None, chat=True)
    with pytest.raises(InputError, match=r"row 1, rendered for a: .*no such role"):
        task.rendered_for(own, "a")
