"""The study in eval/question: its data, its commands, its tables, and where two activations differ."""

import gzip
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from crrelu_llm import patch
from crrelu_llm.comparison.arms import arm_dir, grid_name, parse_arms, parse_grid
from crrelu_llm.comparison.definition import before_training
from crrelu_llm.comparison.settings import SETTINGS
from crrelu_llm.comparison.tuning import SEED, TUNING, parse_tune
from crrelu_llm.report.schema import Point, Trajectory
from crrelu_llm.training.arguments import parse

QUESTION = Path(__file__).resolve().parents[2] / "eval" / "question"


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, by name."""
    names = ("prepare", "run", "sections", "figures", "tables", "why", "length", "positions")
    sys.path.insert(0, str(QUESTION))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(QUESTION))
        for name in names:
            sys.modules.pop(name, None)


def write(path, rows):
    """A gzipped file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def read(path):
    """Its rows."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def chat(question, answer):
    """A conversation of two turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def published(tmp_path):
    """Data sets of a few rows as they were published."""
    folder = tmp_path / "published"
    for part, count in (("train", 30), ("eval", 9)):
        messages = [{"messages": chat(f"{part} {i}", "word " * (i + 1)), "extra": 1} for i in range(count)]
        write(folder / f"dolly-open-qa/{part}.jsonl.gz", messages)
        write(
            folder / f"gsm8k/{part}.jsonl.gz", [{"question": f"{part} {i}?", "answer": "#### 1"} for i in range(count)]
        )
        write(folder / f"gutenberg-novels/{part}.jsonl.gz", [{"text": f"chapter {i} " * 500} for i in range(count)])
        pairs = [
            {"prompt": [turn], "chosen": [answer], "rejected": [answer | {"content": "x" * (100 * i)}]}
            for i in range(count)
            for turn, answer in [chat(f"{part} {i}", "yes")]
        ]
        for name in ("hh-harmless", "pandalm-human-prefs", "alpaca-eval-prefs"):
            write(folder / f"{name}/{part}.jsonl.gz", pairs)
    for part, trees in (("train", range(50)), ("eval", range(50, 60))):
        threads = [
            {"messages": chat(f"tree {tree}", f"answer {rank} " * 40), "tree": f"t{tree}", "leaf_rank": rank}
            for tree in trees
            for rank in (2, None, 0)
        ]
        write(folder / f"oasst-en100/sft-{part}.jsonl.gz", threads)
    return folder


def test_the_data_of_the_study(scripts, published, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(published), str(tmp_path / "data")])
    scripts["prepare"].main()
    made = tmp_path / "data"
    tasks = {*scripts["run"].SFT, *scripts["run"].DPO, "answers"}
    assert {path.name for path in made.iterdir()} == {*tasks, "calibration.jsonl"}
    for task in scripts["run"].SFT:
        rows = read(made / task / "train.jsonl") + read(made / task / "test.jsonl")
        assert rows and all(set(row) == {"messages"} for row in rows)
    conversations = [row["prompt"] + row["completion"] for row in read(made / "answers" / "train.jsonl")]
    assert conversations == [row["messages"] for row in read(made / "dolly" / "train.jsonl")]
    for task in scripts["run"].DPO:  # pairs of at most 500 characters
        rejected = [row["rejected"][0]["content"] for row in read(made / task / "train.jsonl")]
        assert sorted(map(len, rejected)) == [0, 100, 200, 300, 400]
    trees = [
        {row["messages"][0]["content"] for row in read(made / "oasst" / f"{part}.jsonl")} for part in ("train", "test")
    ]
    assert len(trees[0]) == 20 and len(trees[1]) == 40 and not trees[0] & trees[1]
    best = [row["messages"][1]["content"] for row in read(made / "oasst" / "test.jsonl")]
    assert len(best) == 40 and all(text.startswith("answer 0") for text in best)
    held_out = {f"tree {name.split()[1]}" for name in trees[1]}
    assert not any(row["text"].split("\n")[0] in held_out for row in read(made / "calibration.jsonl"))


@pytest.mark.parametrize("model", ["nano", "smollm2", "gemma"])
def test_every_command_of_the_study_is_one_that_compare_takes(scripts, model):
    run = scripts["run"]
    for task in run.tasks(model):
        words = run.command(model, "builtin:nano", task, Path("data"), Path("out"))
        kind, options = words[1], words[2:]
        arms = options[options.index("--arms") + 1 : options.index("--seeds")]
        assert options[options.index("--baseline") + 1] in arms and len(parse_arms(arms)) >= 2
        tries = parse_tune([options[options.index("--tune") + 1]] if "--tune" in options else [])
        assert len(tries) == (0 if task in run.EXTRAS else 2 if model == "smollm2" and kind == "dpo" else 3)
        grid = parse_grid([options[options.index("--grid") + 1]] if "--grid" in options else [])
        betas = ["0.1", "1"] if task in run.DPO else [None] * len(grid)
        assert [point.get("beta") for point in grid] == betas
        assert ["learning_rate" in point for point in grid] == ([True] * 3 if task == "rates" else [False] * len(grid))
        recipe = parse(kind, options[: options.index("--arms")])
        assert recipe.training.max_steps == (200 if task == "long" else run.SETTINGS[model].steps[int(kind == "dpo")])


def comparison(directory, scripts, task, points=({},), finished=True, before=4.5):
    """The files of a comparison that run.py would have left, with made-up losses: the plain swap is behind."""
    setting = scripts["run"].SETTINGS["nano"]
    arms, seeds = list(setting.arms), [0, 1, 2]
    tune = [{"learning_rate": "1e-4"}, {"learning_rate": "1e-3"}]
    settings = {
        "identity": {}, "kind": "sft", "commands": ["crrelu compare"], "created": "now", "baseline": "native",
        "arms": arms, "seeds": seeds, "points": list(points), "recipe": {"model_name_or_path": "nano"}, "tune": tune,
        "asked": [[arm, grid_name(point), seed] for arm in arms for point in points for seed in seeds],
        "data": [{"name": task, "split": "test", "rows": 4, "sha256": "0"}],
    }  # fmt: skip
    places = [(directory, point, seed, 0.0) for point in points for seed in seeds]
    places += [
        (directory / TUNING, point | one, SEED, float(one["learning_rate"])) for point in points for one in tune
    ]
    for base, point, seed, worse in places:
        for index, arm in enumerate(arms):
            items = [2.0 + item + worse + (0.5 if index == 3 else 0.0) + 0.001 * seed * index for item in range(4)]
            run = {
                "status": "done", "metrics": {"loss": sum(items) / 4}, "items": {"loss": items}, "history": [],
                "train_seconds": 10.0, "tokens_per_second": 1.0, "peak_memory_bytes": 2**20,
            }  # fmt: skip
            place = arm_dir(base, arm, point) / f"seed-{seed}"
            place.mkdir(parents=True)
            if finished or seed != 2:
                (place / "run.json").write_text(json.dumps(run))
    for arm in arms:
        for point in points:
            before_training(directory, arm, point).write_text(json.dumps({"loss": before}))
    for base in (directory, directory / TUNING):
        (base / SETTINGS).write_text(json.dumps(settings))


def test_the_tables_of_the_study(scripts, tmp_path, monkeypatch):
    out = tmp_path / "out" / "nano"
    comparison(out / "dolly", scripts, "dolly")
    comparison(out / "hh", scripts, "hh", [{"beta": "0.1"}, {"beta": "1"}], finished=False, before=3.5)
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path / "out"), str(tmp_path / "results")])
    scripts["tables"].main()
    text = (tmp_path / "results" / "question.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| nano")
    ]
    plain = [row for row in rows if row[3] == "crrelu, plain swap"]
    assert [row[1] for row in plain] == ["dolly", "hh, β 0.1", "hh, β 1"]
    assert plain[0][5].startswith("+0.50") and plain[0][8] == "worse" and plain[0][10:] == ["1.000", ""]
    crrelu = next(row for row in rows if row[:4] == ["nano", "dolly", "native (GELU)", "crrelu"])
    assert crrelu[4] == "3" and crrelu[8] == "undecided" and crrelu[11] == "yes"
    assert {row[11] for row in rows if len(row) == 12 and row[1].startswith("hh")} == {"not learnt"}
    assert text.index(" | ".join(crrelu)) < text.index("## The other arms") < text.index(" | ".join(plain[0]))
    arms = {(row[1], row[2]): row for row in rows if len(row) == 9}
    assert arms["dolly", "crrelu"][3] == "1e-4*" and arms["dolly", "crrelu"][6] == "3 of 3"
    assert arms["hh, β 1", "crrelu"][6] == "2 of 3"
    assert "Training took 0.08 hours, the tries 0.07." in text and "Not run: nano/oasst, " in text
    assert "| nano | hh, β 1 | crrelu | **1e-4: 5.5001** · 1e-3: 5.5010 |" in text
    assert (tmp_path / "results" / "question.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results" / "nano" / "dolly" / "report.json").read_text())["examples"] == []
    shutil.rmtree(out / "hh")  # the study continues on another machine: the report of these runs stays
    comparison(out / "oasst", scripts, "oasst")
    scripts["tables"].main()
    later = (tmp_path / "results" / "question.md").read_text()
    assert all(line in later for line in text.splitlines() if line.startswith("| nano | hh, β 1 | "))
    assert "| nano | oasst | crrelu |" in later and "Not run: nano/gsm8k, " in later


def test_the_picture_of_a_difference_during_training(scripts, tmp_path):
    points = [Point(step=step, difference=0.01, ci_low=-0.01, ci_high=0.03, n=3) for step in (1, 2, 3)]
    arms = ("relu", "crrelu", scripts["run"].PLAIN, "silu")
    shown = [Trajectory(candidate=arm, grid={}, points=points) for arm in arms]
    scripts["figures"].draw_training(shown, "native", tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_where_two_activations_differ(scripts):
    why = scripts["why"]
    model, patched = (tiny_model("llama", num_hidden_layers=3) for _ in range(2))
    blocks = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(0))
    patch(patched, epsilon_init=3.0, calibration="none", layers="1")
    paths = [site["path"] for site in patched.config.crrelu["sites"]]
    modules = {path: patched.get_submodule(path) for path in paths}
    found = why.by_layer(model, patched, modules, blocks)
    assert list(found["sites"]) == ["model.layers.1.mlp.act_fn"]
    assert found["sites"]["model.layers.1.mlp.act_fn"] == found["all"] and found["all"]["difference"] != 0
    same = {path: model.get_submodule(path) for path in paths}
    assert why.by_layer(model, model, same, blocks)["all"]["difference"] == 0
    parts = why.by_curve(model, modules, blocks)
    for name in ("inputs", "slope", "value"):
        assert sum(part[name] for part in parts) == pytest.approx(1)
    assert json.loads(json.dumps(parts)) == parts and parts[0]["from"] is None
    centre = [
        part for part in parts if part["to"] is not None and part["from"] is not None and abs(part["to"]) <= 0.25
    ]
    assert sum(part["slope"] for part in centre) > 0.5  # a tiny random model's inputs lie there


def test_rewards_that_follow_the_length(scripts, tmp_path, monkeypatch, capsys):
    directory, data = tmp_path / "pandalm", tmp_path / "test.jsonl"
    comparison(directory, scripts, "pandalm", [{"beta": "0.1"}])
    answers = [("long answer", "short"), ("no", "a longer one"), ("yes, a long answer", "no"), ("so", "so")]
    sides = [
        {side: chat("", text)[1:] for side, text in zip(("chosen", "rejected"), pair, strict=True)} for pair in answers
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in sides))
    for path in directory.glob("*/beta=0.1/seed-*/run.json"):
        run = json.loads(path.read_text())
        margins = [1.0, -2.0, 3.0, 0.0] if path.parts[-4] == "relu" else [0.1, 0.2, -0.1, 0.3]
        run["items"] |= {"reward_margin": margins, "reward_accuracy": [float(margin > 0) for margin in margins]}
        path.write_text(json.dumps(run))
    monkeypatch.setattr(sys, "argv", ["length.py", str(directory), str(data), str(tmp_path / "out.json")])
    scripts["length"].main()
    assert "| relu | 0.1 | 3 | 3.501 | 0.50 | 1.00 | 0.00 | 1.00 |" in capsys.readouterr().out
    native, *_ = json.loads((tmp_path / "out.json").read_text())
    assert (native["longer"], native["shorter"]) == (0.5, 1.0) and native["correlation"] < 0
    data.write_text(data.read_text() * 2)
    with pytest.raises(SystemExit, match="2"):
        scripts["length"].main()
    assert "4 pairs and the data 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (
            "run",
            ["data", "out", "--models", "foo=builtin:nano"],
            "write NAME=PATH, with the names nano, smollm2, gemma",
        ),
        ("run", ["nowhere", "out", "--models", "nano=builtin:nano"], "make it with prepare.py"),
        ("tables", ["nowhere", "elsewhere"], "no comparison in nowhere or elsewhere"),
        ("length", ["nowhere", "no.jsonl", "out.json"], "no.jsonl"),
        ("positions", ["builtin:nano", "builtin:nano", "no.jsonl", "out.json"], "no.jsonl"),
    ],
)
def test_wrong_words_end_with_status_2(scripts, tmp_path, monkeypatch, capsys, script, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with pytest.raises(SystemExit, match="2"):
        scripts[script].main()
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_difference_by_position(scripts):
    positions = scripts["positions"]
    model, documents = tiny_model("llama"), [[1, 2, 3, 4, 5], [1, 7, 8]]
    losses = positions.token_losses(model, documents)
    with torch.no_grad():
        whole = [model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in documents]
    assert [part.mean().item() for part in losses] == pytest.approx(whole)
    better = [part - torch.tensor([1.0] + [0.0] * (len(part) - 1)) for part in losses]  # by 1 at the first token
    first, second, last, others = positions.by_position(losses, better, [True, False], first=2)
    assert (first["tokens"], first["count"], first["difference"], first["a_document"]) == ("1", 2, -1, -1)
    assert second["count"] == 2 and second["difference"] == 0
    assert (last["tokens"], last["count"], others["tokens"], others["count"]) == ("last", 1, "others", 1)
    assert sum(part["a_document"] for part in (first, second, last, others)) == -1
