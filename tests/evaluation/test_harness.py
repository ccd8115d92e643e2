"""lm-eval's tasks: equal to plain lm-eval to the last digit, whatever the batch; data that does not fit is refused."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is an extra: eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from suite_data import arc, by_hand, language_model, prepared, write, write_all
from transformers import AutoModelForCausalLM, AutoTokenizer

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation import harness
from crrelu_llm.evaluation.documents import truthful_share, wikitext_pages
from crrelu_llm.evaluation.harness import HarnessTask, manager_for
from crrelu_llm.evaluation.lm import build
from crrelu_llm.evaluation.suites import TaskSpec, read_suite

PLAIN = {
    "output_type": "multiple_choice",
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices.text}}",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def plainly(data_dir, tmp_path, checkpoint, **options):
    """The same questions through lm-eval alone: a task file in a folder, HFLM, simple_evaluate."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    files = {"data_files": {"test": str(data_dir / "arc-easy" / "test.jsonl.gz")}}
    (folder / "plain.yaml").write_text(yaml.safe_dump(PLAIN | {"task": "plain", "dataset_kwargs": files}))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=4),
        tasks=["plain"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_it_equals_plain_lm_eval_to_the_last_digit(data_dir, tmp_path, tiny_llama_checkpoint, chat):
    theirs = plainly(data_dir, tmp_path, tiny_llama_checkpoint, apply_chat_template=chat, fewshot_as_multiturn=chat)
    ours = prepared("arc_easy", data_dir, chat=chat).run(language_model(tiny_llama_checkpoint))
    samples = theirs["samples"]["plain"]
    for metric in ("acc", "acc_norm"):
        assert ours.metrics[metric] == theirs["results"]["plain"][f"{metric},none"]
        assert ours.items[metric] == [sample[metric] for sample in samples]
    assert [example.responses for example in ours.examples] == [
        [response[0][0] for response in sample["resps"]] for sample in samples
    ]
    assert ("<|user|>" in ours.examples[0].prompt) == chat


@pytest.mark.parametrize("fixture", ["tiny_checkpoint", "tiny_llama_checkpoint"])
@pytest.mark.parametrize("name", ["arc_easy", "wikitext"])
def test_batches_and_padding_do_not_matter(data_dir, request, fixture, name):
    checkpoint = request.getfixturevalue(fixture)
    task = prepared(name, data_dir)
    results = [task.run(language_model(checkpoint, size)) for size in (1, 7, "auto")]
    for other in results[1:]:
        for first, second in zip(results[0].examples, other.examples, strict=True):
            np.testing.assert_allclose(second.responses, first.responses, rtol=0, atol=1e-5)
            assert second.prompt == first.prompt


def test_the_likelihood_of_an_answer_by_hand(data_dir, tiny_llama_checkpoint, tokenizer):
    found = prepared("arc_easy", data_dir, limit=2).run(language_model(tiny_llama_checkpoint))
    assert len(found.examples) == 2
    for row, example in zip(arc(), found.examples, strict=False):
        context = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        for text, response in zip(row["choices"]["text"], example.responses, strict=True):
            whole = tokenizer(f"Question: {row['question']}\nAnswer: {text}")["input_ids"]
            assert response == pytest.approx(by_hand(tiny_llama_checkpoint, whole, len(context)), abs=1e-4)


def test_items_of_perplexities(data_dir, tiny_checkpoint):
    lm = language_model(tiny_checkpoint)
    lambada = prepared("lambada_openai", data_dir).run(lm)
    assert math.exp(np.mean(lambada.items["loss"])) == pytest.approx(lambada.metrics["perplexity"])
    low, high = lambada.intervals["perplexity"]
    assert low < lambada.metrics["perplexity"] < high
    wikitext = prepared("wikitext", data_dir).run(lm)
    assert len(wikitext.items["bits_per_byte"]) == 3
    assert np.mean(wikitext.items["bits_per_byte"]) == pytest.approx(wikitext.metrics["bits_per_byte"], rel=1e-12)
    assert 2 ** wikitext.metrics["bits_per_byte"] == pytest.approx(wikitext.metrics["byte_perplexity"])
    assert not wikitext.higher_is_better["bits_per_byte"]
    assert "word_perplexity" not in wikitext.items


def test_a_limit_is_spread_over_groups(data_dir, tiny_checkpoint):
    task = prepared("blimp", data_dir, limit=5)
    assert task.rows == 5 and task.data[0].rows == 12
    found = task.run(language_model(tiny_checkpoint))
    assert [example.group[-1] for example in found.examples] == ["0", "0", "1", "1", "2"]
    assert [example.id for example in found.examples] == [0, 1, 4, 5, 8]
    assert set(found.groups) == {"paradigm_0", "paradigm_1", "paradigm_2"}
    means = [found.groups[f"paradigm_{group}"]["acc"] for group in (0, 0, 1, 1, 2)]
    assert np.mean(means) == pytest.approx(found.metrics["acc"])


def test_what_decides_a_result_does_not_name_the_place(data_dir, tmp_path):
    task = prepared("blimp", data_dir)
    assert str(tmp_path) not in str(task.config) + str(task.data)
    other = write_all(tmp_path / "elsewhere")
    assert (prepared("blimp", other).config, prepared("blimp", other).data) == (task.config, task.data)
    assert prepared("blimp", data_dir, limit=3).config != task.config


def test_data_without_a_column_is_refused(data_dir):
    write(data_dir / "arc-easy" / "test.jsonl.gz", [{"question": "why", "choices": {"text": ["a"], "label": ["A"]}}])
    with pytest.raises(InputError, match=r"arc_easy cannot use arc-easy/test.jsonl.gz.*answerKey") as caught:
        prepared("arc_easy", data_dir)
    assert "\n" not in str(caught.value)
    write(data_dir / "blimp" / "blimp.jsonl.gz", [{"sentence_good": "a", "sentence_bad": "b"}])
    with pytest.raises(InputError, match="uid"):
        prepared("blimp", data_dir)


def _of_the_hub(tmp_path):
    """The only task of a suite: a whole configuration, its data on the hub."""
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"tasks": [PLAIN | {"task": "mine", "dataset_path": "someone/arc"}]}))
    return read_suite(str(path))


def test_a_configuration_with_data_of_the_hub(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name=None, **_):
        asked.append((path, name))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(arc(4))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (spec,) = _of_the_hub(tmp_path)
    task = HarnessTask(spec, None, None, False, manager_for([spec]))
    assert task.rows == 4 and asked == [("someone/arc", None)]
    assert task.data[0].name == "mine" and task.config["tasks"]["mine"]["dataset_path"] == "someone/arc"


def test_data_that_the_hub_does_not_give(tmp_path):
    (spec,) = _of_the_hub(tmp_path)
    with pytest.raises(InputError, match=r"the task mine: lm-eval cannot load it: .*someone/arc.*needs the network"):
        HarnessTask(spec, None, None, False, manager_for([spec]))


def test_long_requests_are_cut_and_it_is_said(data_dir, tiny_checkpoint):
    rows = arc(2)
    rows[1]["question"] *= 40
    write(data_dir / "arc-easy" / "test.jsonl.gz", rows)
    found = prepared("arc_easy", data_dir).run(language_model(tiny_checkpoint))
    assert found.notes == ["4 requests are longer than the model's context and lost their beginning"]


def test_data_of_nltk_is_asked_for_first(data_dir, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda name: False)  # lm-eval tries when ifeval is imported
    write(
        data_dir / "ifeval" / "input_data.jsonl.gz",
        [{"key": 1, "prompt": "say", "instruction_id_list": [], "kwargs": []}],
    )
    with pytest.raises(InputError, match=r"nltk's punkt_tab: run `python -m nltk\.downloader punkt_tab`"):
        prepared("ifeval", data_dir)


def test_pages_of_wikitext():
    from datasets import Dataset

    lines = ["", " = One = ", "", " text = here ", " = = Part = = ", " more ", " = Two words = ", " last "]
    pages = wikitext_pages(Dataset.from_dict({"text": lines}))["page"]
    assert len(pages) == 3 - 1 and pages[0].startswith(" = One = \n") and "Part" in pages[0]
    assert pages[1] == " = Two words = \n last \n"


def test_the_share_of_true_answers():
    doc = {"mc2_targets": {"labels": [1, 0, 1]}}
    results = [(math.log(0.2), False), (math.log(0.3), False), (math.log(0.1), True)]
    assert truthful_share(doc, results)["acc"] == pytest.approx(0.5)
    assert truthful_share(doc, [(value - 5000, flag) for value, flag in results])["acc"] == pytest.approx(0.5)


@pytest.mark.parametrize(("asked", "used"), [(16, 16), (10_000, None)])
def test_a_shorter_context_is_that_of_lm_eval(tiny_llama_checkpoint, asked, used):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_llama_checkpoint),
        AutoTokenizer.from_pretrained(tiny_llama_checkpoint),
    )
    lm = build(model, tokenizer, 4, torch.device("cpu"), asked)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=used)
    texts = ["one two three four " * 20, "five six"]
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=i)
        for i, text in enumerate(texts)
    ]
    assert lm.max_length == theirs.max_length
    assert lm.loglikelihood_rolling(requests) == theirs.loglikelihood_rolling(requests)
    ((_, tokens, cut),) = lm.score([("a b c d " * 10, " e f")])
    assert cut == (used is not None) and tokens < 16


def test_what_decides_a_result_names_no_address_of_this_process(data_dir):
    """Else a restarted evaluation would compute again what it has: `<function wikitext_pages at 0x7f…>`."""
    for name in ("wikitext", "arc_easy", "blimp"):
        assert not re.search(r"\bat 0x[0-9a-f]+", json.dumps(prepared(name, data_dir).config)), name


def test_a_tag_and_a_group_of_different_metrics_are_refused(monkeypatch):
    manager = SimpleNamespace(all_tasks=["arc", "tag"], all_tags=["tag"])
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)
    assert manager_for([TaskSpec("arc", None, "mine.yaml")]) is manager
    for name, said in (("tag", "mine.yaml: 'tag' is a tag of lm-eval"), ("absent", "lm-eval has no task 'absent'")):
        with pytest.raises(InputError, match=said):
            manager_for([TaskSpec(name, None, "mine.yaml")])
    tasks = {name: SimpleNamespace(aggregation=lambda own=own: dict.fromkeys(own)) for name, own in METRICS.items()}
    with pytest.raises(InputError, match=r"different metrics \(a, c\); name single tasks"):
        harness._check_metrics(tasks, TaskSpec("group", None, "mine.yaml"))
    harness._check_metrics({name: tasks[name] for name in "ab"}, TaskSpec("group", None, "mine.yaml"))


METRICS = {"a": ("acc",), "b": ("acc",), "c": ("acc", "acc_norm")}
