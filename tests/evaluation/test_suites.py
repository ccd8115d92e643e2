"""Suites and task files: what they name exists, and a local task asks what lm-eval's own task asks."""

from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra: eval")

import yaml
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template
from suite_data import WORDS, arc, blimp, sentence

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.suites import import_functions, read_suite, suite_names
from crrelu_llm.recipes_path import eval_dir

LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
# local task -> lm-eval's file, and a row that both can read
SAME = {
    "blimp": ("blimp/causative.yaml", blimp()[0]),
    "arc_easy": ("arc/arc_easy.yaml", arc()[1]),
    "arc_challenge": ("arc/arc_challenge.yaml", arc()[2]),
    "piqa": ("piqa/piqa.yaml", {"goal": sentence(1), "sol1": sentence(2), "sol2": sentence(3), "label": 1}),
    "lambada_openai": ("lambada/lambada_openai.yaml", {"text": sentence(4)}),
    "truthfulqa_mc2": (
        "truthfulqa/truthfulqa_mc2.yaml",
        {"question": sentence(5), "mc2_targets": {"choices": WORDS[:3], "labels": [1, 0, 1]}},
    ),
    "mmlu": (
        "mmlu/default/mmlu_high_school_physics.yaml",
        {"question": f" {sentence(6)} ", "subject": "high_school_physics", "choices": WORDS[:4], "answer": 2},
    ),
    "gsm8k": ("gsm8k/gsm8k.yaml", {"question": sentence(7), "answer": "so #### 7"}),
}


def rendered(config, row):
    """What a task's templates make of a row."""
    found = {}
    for key in ("description", "doc_to_text", "doc_to_target", "doc_to_choice"):
        template = config.get(key, "")
        if isinstance(template, str) and template in row:
            found[key] = row[template]
        else:
            found[key] = apply_template(template, row) if isinstance(template, str) else template
    if config.get("doc_to_target") == 0:
        found["doc_to_target"] = 0
    return found


def local(name):
    (spec,) = read_suite("local", [name])
    return spec


@pytest.mark.parametrize("name", SAME)
def test_a_local_task_asks_what_lm_evals_own_asks(name):
    path, row = SAME[name]
    theirs, ours = load_yaml(LM_EVAL_TASKS / path, resolve_func=False), local(name).config
    assert rendered(ours, row) == rendered(theirs, row)
    assert sentence(SAME_SEED[name])[:5] in str(rendered(ours, row))
    for key in ("output_type", "num_fewshot", "generation_kwargs", "filter_list"):
        assert ours.get(key) == theirs.get(key), key
    assert [m["metric"] for m in ours["metric_list"]] == [m["metric"] for m in theirs["metric_list"]]
    assert float(ours["metadata"]["version"]) == float(theirs["metadata"]["version"])


SAME_SEED = {
    "blimp": 0, "arc_easy": 1, "arc_challenge": 2, "piqa": 1, "lambada_openai": 4, "truthfulqa_mc2": 5, "mmlu": 6,
    "gsm8k": 7,
}  # fmt: skip


def test_the_shipped_suites():
    assert suite_names() == ["language-modelling", "local", "preference", "standard"]
    standard = {spec.name for spec in read_suite("standard")}
    assert {"hellaswag", "winogrande", "boolq", "mmlu", "ifeval"} <= standard and len(standard) == 13
    assert not {spec.name for spec in read_suite("local")} & {"gsm8k", "ifeval"}
    assert [spec.name for spec in read_suite("local", ["gsm8k", "blimp"])] == ["blimp", "gsm8k"]


def test_lm_eval_has_the_tasks_of_the_standard_suite():
    names = set()
    for path in LM_EVAL_TASKS.rglob("*.yaml"):
        if path.parts[-2] in ("hellaswag", "arc", "piqa", "winogrande", "super_glue", "boolq", "lambada", "truthfulqa",
                              "default", "gsm8k", "ifeval", "blimp", "wikitext"):  # fmt: skip
            config = load_yaml(path, resolve_func=False)
            names |= {str(config.get("task")), str(config.get("group"))}
    assert {spec.name for spec in read_suite("standard")} <= names


def test_every_task_file_is_documented_with_its_data_file():
    readme = (eval_dir() / "README.md").read_text()
    for path in sorted((eval_dir() / "tasks").glob("*.yaml")):
        spec = local(path.stem)
        assert spec.name == path.stem and spec.files()
        assert all(f"`{file}`" in readme for file in spec.files()), spec.files()


def test_data_files_become_tasks():
    specs = read_suite("preference", data=["data/hh/eval.jsonl.gz", "data/mine.parquet"])
    assert [(spec.name, spec.kind) for spec in specs] == [("hh-eval", "preference"), ("mine", "preference")]
    (spec,) = read_suite("language-modelling", data=["builtin:docstrings"])
    assert (spec.name, spec.kind, spec.files()) == ("docstrings", "language_modelling", ["builtin:docstrings"])


def test_a_suite_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\noutput_type: multiple_choice\n")
    suite = {"tasks": ["piqa", "mine.yaml", {"task": "pairs", "output_type": "preference", "data": "p.jsonl"}]}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    specs = read_suite(str(path))
    assert [(spec.name, spec.kind) for spec in specs] == [
        ("piqa", "lm_eval"),
        ("mine", "lm_eval"),
        ("pairs", "preference"),
    ]
    assert specs[0].config is None and specs[1].config["dataset_path"] == "json"


WRONG = {
    "no tasks": ("tasks: []", "no tasks"),
    "unknown key": ("task: [piqa]", "no key 'task'"),
    "unknown source": ("{source: hub, tasks: [piqa]}", "source must be"),
    "unknown local task": ("{source: local, tasks: [pica]}", "no local task 'pica'"),
    "twice": ("tasks: [piqa, piqa]", "piqa is there twice"),
    "no file": ("tasks: [gone.yaml]", "gone.yaml: cannot be read"),
    "no name": ("tasks: [{output_type: preference}]", "needs a name"),
    "no data": ("tasks: [{task: x, output_type: preference}]", "needs a data file"),
    "tasks in a word": ("tasks: piqa", "tasks must be a list"),
    "template in a list": ("template: [1]", "template must be a mapping"),
    "files in a word": ("tasks: [{task: x, dataset_kwargs: {data_files: a.jsonl}}]", "data_files must be a mapping"),
    "metadata in a word": ("tasks: [{task: x, metadata: y}]", "metadata must be a mapping"),
    "a name that is taken": ("tasks: [{task: model, output_type: preference, data: p.jsonl}]", "called model"),
    "a name of two lines": ('tasks: [{task: "a\\nb"}]', "needs a name"),
    "a long name": (f"tasks: [{{task: {'x' * 300}}}]", "needs a name"),
    "not a mapping": ("- piqa", "must be a mapping"),
    "not YAML": ("tasks: [", "not valid YAML"),
    "any code": ("tasks: [{task: x, process_docs: !function os.system}]", "only functions of crrelu_llm and lm_eval"),
    "an object": ("tasks: !!python/object/apply:os.getcwd []", "not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_suite_is_one_line(text, message, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_suite(str(path))
    assert "\n" not in str(caught.value)


def test_wrong_names():
    with pytest.raises(InputError, match="no such suite; choose language-modelling, local"):
        read_suite("locale")
    with pytest.raises(InputError, match="--tasks pica: no such task"):
        read_suite("local", ["pica"])
    with pytest.raises(InputError, match="needs its data"):
        read_suite("preference")
    with pytest.raises(InputError, match=r"--data a/x.jsonl b/x.txt: a task takes the name of its file"):
        read_suite("preference", data=["a/x.jsonl", "y.jsonl", "b/x.txt"])
    with pytest.raises(InputError, match="--data_dir"):
        read_suite("local", data=["x.jsonl"])


def test_a_function_whose_package_is_missing(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text("tasks: [{task: x, process_docs: !function lm_eval.tasks.nowhere.f}]")
    (spec,) = read_suite(str(path))
    with pytest.raises(InputError, match=r"task x needs lm_eval.tasks.nowhere.*--tasks"):
        import_functions(spec.config, spec.name)
