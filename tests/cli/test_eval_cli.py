"""`crrelu eval` as a user runs it: the report, going on after an interruption, adapters, wrong input in one line."""

import json
import shutil

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is an extra: eval")

from crash import Children
from safetensors.torch import load_file, save_file
from suite_data import arc, pairs, sentence, write, write_all
from transformers import AutoModelForCausalLM

from crrelu_llm.cli import main as command_line
from crrelu_llm.evaluation import run as runner

TASKS = ["arc_easy", "blimp", "hh_harmless"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with data for five tasks, and a data cache of its own; no pictures, which take seconds."""
    import datasets

    from crrelu_llm.report import render

    monkeypatch.setattr(render, "pictures", lambda *args: [])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_all(tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="module")
def patched(tiny_checkpoint, tmp_path_factory):
    """The tiny GPT-2 with CRReLU."""
    target = tmp_path_factory.mktemp("patched") / "crrelu"
    argv = ["patch", str(tiny_checkpoint), "--calibration", "none", "--output_dir", str(target)]
    argv += ["--perplexity_data", "none"]
    assert command_line.main(argv) == 0
    return target


def options(place, *models, tasks=TASKS, out="out"):
    return [
        "eval", "--models", *models, "--suite", "local", "--data_dir", str(place / "data"), "--tasks", *tasks,
        "--output_dir", str(place / out), "--batch_size", "4", "--device", "cpu",
    ]  # fmt: skip


def report(place, out="out"):
    return json.loads((place / out / "report.json").read_text())


def numbers(place, out="out"):
    """A report without the cost and what names its directory."""
    found = report(place, out)
    for arm in found["arms"]:
        del arm["runs"][0]["seconds"], arm["runs"][0]["peak_memory_bytes"]
    return {key: found[key] for key in ("arms", "comparisons", "data", "metrics", "verdict", "notes")}


def refused(capsys, *argv):
    """The one line on stderr of wrong input."""
    capsys.readouterr()
    assert command_line.main([str(word) for word in argv]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("eval: ")]
    assert printed.out == "" and len(lines) == 1, printed
    return lines[0]


def test_two_models_side_by_side(place, tiny_checkpoint, patched, capsys, monkeypatch):
    from crrelu_llm.report import plots, render

    monkeypatch.setattr(render, "pictures", plots.pictures)
    argv = options(place, f"native={tiny_checkpoint}", f"crrelu={patched}")
    assert command_line.main(argv) == 0
    assert "report: " in capsys.readouterr().out
    found = report(place)
    assert [arm["arm"] for arm in found["arms"]] == ["native", "crrelu"]
    assert [arm["activation"] for arm in found["arms"]] == ["gelu_new", "crrelu"]
    run = found["arms"][1]["runs"][0]
    assert run["status"] == "done" and len(run["epsilon"]) == 2
    assert set(run["items"].items()) == {("arc_easy", 6), ("blimp", 12), ("hh_harmless", 6)}
    assert {"arc_easy/acc", "arc_easy/acc_norm", "blimp/acc", "hh_harmless/logp_accuracy"} <= set(run["metrics"])
    entry = next(entry for entry in found["comparisons"] if entry["metric"] == "hh_harmless/logp_margin")
    assert (entry["unit"], entry["n"], entry["baseline"], entry["candidate"]) == ("item", 6, "native", "crrelu")
    values = [arm["runs"][0]["metrics"]["hh_harmless/logp_margin"] for arm in found["arms"]]
    assert entry["difference"] == pytest.approx(values[1] - values[0]) != 0
    assert not any("longer_answer" in entry["metric"] for entry in found["comparisons"])
    assert (found["data"][0]["name"], found["data"][0]["rows"]) == ("blimp/blimp.jsonl.gz", 12)
    assert found["verdict"].startswith("Of 3 tasks, crrelu is")
    for name in ("report.md", "report.html"):
        text = (place / "out" / name).read_text()
        assert found["verdict"] in text and "arc_easy: accuracy" in text
    assert 'role="img"' in (place / "out" / "report.html").read_text()
    assert run["peak_memory_bytes"] > 0 and sum(run["seconds"].values()) > 0
    changes = {entry["metric"]: entry for entry in found["changes"]}
    assert set(changes) == {"arc_easy/margin", "blimp/margin", "hh_harmless/logp_margin"}
    right = [sum(base > 0 for base, _ in changes[f"{task}/margin"]["points"]) for task in ("arc_easy", "blimp")]
    base = found["arms"][0]["runs"][0]["metrics"]
    assert right == [round(6 * base["arc_easy/acc"]), round(12 * base["blimp/acc"])]
    example = next(entry for entry in found["examples"] if entry["metric"] == "hh_harmless/logp_margin")
    chosen, rejected = example["options"]
    assert chosen["right"] and not rejected["right"]
    assert chosen["candidate"] - rejected["candidate"] == pytest.approx(example["values"][1])


def test_an_interrupted_evaluation_goes_on(place, tiny_checkpoint, patched, capsys, monkeypatch):
    models = (f"native={tiny_checkpoint}", f"crrelu={patched}")
    tasks = ["arc_easy", "hh_harmless"]
    assert command_line.main(options(place, *models, tasks=tasks, out="whole")) == 0
    original, calls = runner._one_task, []

    def interrupted(task, *rest):
        calls.append(task.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(task, *rest)

    monkeypatch.setattr(runner, "_one_task", interrupted)
    argv = options(place, *models, tasks=tasks)
    assert command_line.main(argv) == 130
    assert "finished tasks are kept" in capsys.readouterr().err
    assert not (place / "out" / "report.json").exists()
    assert command_line.main(argv) == 0
    assert len(calls) == 3 + 2  # two are kept, the third was interrupted
    assert capsys.readouterr().err.count(": kept") == 2
    assert numbers(place) == numbers(place, "whole")
    (place / "out" / "report.json").unlink()
    assert command_line.main(["report", str(place / "out")]) == 0
    assert numbers(place) == numbers(place, "whole")
    assert report(place)["examples"]
    argv = ["report", str(place / "out"), "--without_examples", "--margin", "arc_easy/acc=0.9"]
    assert command_line.main(argv) == 0
    assert report(place)["examples"] == [] and report(place)["changes"]
    (entry,) = [entry for entry in report(place)["comparisons"] if entry["metric"] == "arc_easy/acc"]
    assert entry["equivalence_margin"] == 0.9
    assert "no such metric" in refused(capsys, "report", place / "out", "--margin", "loss=0.1")


@pytest.mark.slow
@pytest.mark.parametrize("write_number", [3, 5, 7, 9])
def test_a_killed_evaluation_goes_on(place, tiny_checkpoint, patched, tmp_path_factory, write_number):
    children = Children(tmp_path_factory.mktemp("children"))
    models = (f"native={tiny_checkpoint}", f"crrelu={patched}")
    assert children.run(options(place, *models, out="whole"))[0] == 0
    assert children.run(options(place, *models), kill_at=write_number)[0] == -9
    code, _, _, log = children.run(options(place, *models))
    assert code == 0, log
    assert numbers(place) == numbers(place, "whole")
    assert not list((place / "out").rglob("*.tmp"))


def test_what_stands_in_the_way_of_the_directory_is_named(place, tiny_checkpoint, capsys):
    (place / "link").symlink_to(place / "nowhere")
    (place / "taken" / ".lock").mkdir(parents=True)
    for out, named in (("link", "link"), ("taken", ".lock")):
        line = refused(capsys, *options(place, f"native={tiny_checkpoint}", tasks=["arc_easy"], out=out))
        assert f"{named} stands in the way" in line and "give another directory" in line


def test_two_evaluations_in_one_directory(place, tiny_checkpoint, capsys):
    from crrelu_llm.files import alone

    argv = options(place, f"native={tiny_checkpoint}", tasks=["arc_easy"])
    with alone(place / "out", "crrelu eval"):
        assert "another `crrelu eval` is at work there" in refused(capsys, *argv)
    assert command_line.main(argv) == 0


def test_other_data_and_other_settings(place, tiny_checkpoint, capsys):
    argv = options(place, f"native={tiny_checkpoint}", tasks=["arc_easy"])
    assert command_line.main(argv) == 0
    first = report(place)
    write(place / "data" / "arc-easy" / "test.jsonl.gz", arc(5))
    assert command_line.main([*argv, "--limit", "2"]) == 0
    said = "arc_easy: a result on disk is for other settings of the task and another data version; it is kept"
    assert said in capsys.readouterr().err
    assert report(place)["arms"][0]["runs"][0]["items"] == {"arc_easy": 2}
    assert report(place)["data"][0]["sha256"] != first["data"][0]["sha256"]
    write(place / "data" / "arc-easy" / "test.jsonl.gz", arc())
    assert command_line.main(argv) == 0  # nothing was lost
    assert "arc_easy: kept" in capsys.readouterr().err
    assert report(place)["arms"] == first["arms"]


def test_an_adapter_beside_its_model(place, tiny_checkpoint, patched, capsys):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(patched), LoraConfig(init_lora_weights=False))
    adapted.save_pretrained(place / "adapter")
    models = (f"crrelu={patched}", f"tuned={place / 'adapter'}")
    argv = [*options(place, *models, tasks=["hh_harmless"]), "--reference", "crrelu", "--beta", "0.5"]
    assert command_line.main(argv) == 0
    base, tuned = (arm["runs"][0] for arm in report(place)["arms"])
    assert len(tuned["epsilon"]) == 2 and tuned["metrics"]["hh_harmless/preference_loss"] > 0
    assert "hh_harmless/preference_loss" not in base["metrics"]
    key = "hh_harmless/logp_margin"
    wanted = 0.5 * (tuned["metrics"][key] - base["metrics"][key])
    assert tuned["metrics"]["hh_harmless/reward_margin"] == pytest.approx(wanted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(place / "merged")
    for file in tiny_checkpoint.glob("tokenizer*"):
        shutil.copy(file, place / "merged")
    assert command_line.main(options(place, f"merged={place / 'merged'}", tasks=["hh_harmless"], out="other")) == 0
    assert report(place, "other")["arms"][0]["runs"][0]["metrics"][key] == pytest.approx(
        tuned["metrics"][key], abs=1e-3
    )


@pytest.mark.slow
def test_any_preference_file_and_any_text(place, tiny_checkpoint, text_file):
    write(place / "mine.jsonl.gz", pairs(4))
    common = ["--models", f"a={tiny_checkpoint}", "--batch_size", "4", "--device", "cpu", "--apply_chat_template"]
    argv = ["eval", *common, "--suite", "preference", "--data", place / "mine.jsonl.gz", "--output_dir", place / "p"]
    assert command_line.main([str(word) for word in argv]) == 0
    assert "mine/logp_accuracy" in report(place, "p")["arms"][0]["runs"][0]["metrics"]
    argv = ["eval", *common, "--suite", "language-modelling", "--data", text_file, "--limit", "2"]
    assert command_line.main([str(word) for word in [*argv, "--output_dir", place / "t"]]) == 0
    run = report(place, "t")["arms"][0]["runs"][0]
    low, high = run["intervals"]["topics/perplexity"]
    assert low < run["metrics"]["topics/perplexity"] < high


def test_other_tokenizers_are_compared_by_byte_only(place, tiny_checkpoint, capsys):
    text = write(place / "short.jsonl.gz", [{"text": sentence(number, 9)} for number in range(3)])
    models = ["--models", f"native={tiny_checkpoint}", "nano=builtin:nano", "--batch_size", "4", "--device", "cpu"]
    argv = ["eval", *models, "--suite", "language-modelling", "--data", str(text)]
    assert command_line.main([*argv, "--output_dir", str(place / "t")]) == 0
    found = report(place, "t")
    assert {entry["metric"] for entry in found["comparisons"]} == {"short/bits_per_byte"}
    assert any("tokenizer of nano" in note for note in found["notes"])
    wrong = [*options(place, f"a={tiny_checkpoint}", "b=builtin:nano"), "--reference", "a"]
    assert "b has another tokenizer" in refused(capsys, *wrong)


def test_a_model_that_gives_nan_fails_alone(place, tiny_checkpoint, capsys):
    broken = place / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert command_line.main(options(place, f"native={tiny_checkpoint}", f"broken={broken}", tasks=["blimp"])) == 1
    printed = capsys.readouterr()
    assert "broken failed on blimp; the other results are kept" in printed.err
    assert "cannot be decided, because" in printed.out
    runs = [arm["runs"][0] for arm in report(place)["arms"]]
    assert [run["status"] for run in runs] == ["done", "failed"]
    assert "not a number" in runs[1]["error"] and "none of its tasks is evaluated" in runs[1]["error"]
    assert report(place)["comparisons"] == []


def test_a_model_that_cannot_be_loaded_fails_alone(place, tiny_checkpoint, capsys):
    narrow, few = place / "narrow", place / "few"
    shutil.copytree(tiny_checkpoint, narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"n_embd": 16}))
    shutil.copytree(tiny_checkpoint, few)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model.resize_token_embeddings(300)
    model.save_pretrained(few)
    models = (f"native={tiny_checkpoint}", f"narrow={narrow}", f"few={few}", f"last={tiny_checkpoint}")
    assert command_line.main(options(place, *models, tasks=["arc_easy"])) == 1
    printed = capsys.readouterr().err
    assert "narrow failed on arc_easy; the other results are kept" in printed and "Traceback" not in printed
    runs = [arm["runs"][0] for arm in report(place)["arms"]]
    assert [run["status"] for run in runs] == ["done", "failed", "failed", "done"]
    assert "cannot be loaded: " in runs[1]["error"]
    assert "embeddings for only 300" in runs[2]["error"]


def test_models_without_their_files_are_refused_first(place, tiny_checkpoint, capsys):
    good = f"native={tiny_checkpoint}"
    cut, bare, mute = place / "cut", place / "bare", place / "mute"
    for folder in (cut, bare, mute):
        shutil.copytree(tiny_checkpoint, folder)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cut/model.safetensors: cannot be read" in refused(capsys, *options(place, good, f"cut={cut}"))
    weights.rename(cut / "model-00001-of-00002.safetensors")
    (cut / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00002-of-00002.safetensors"}}')
    assert "names model-00002-of-00002.safetensors, which is" in refused(capsys, *options(place, good, f"cut={cut}"))
    (cut / "model.safetensors.index.json").write_text("[]")
    assert "index.json: damaged" in refused(capsys, *options(place, good, f"cut={cut}"))
    (bare / "model.safetensors").unlink()
    assert "no weights there" in refused(capsys, *options(place, good, f"bare={bare}"))
    for file in mute.glob("tokenizer*"):
        file.unlink()
    assert "returns no tokens" in refused(capsys, *options(place, good, f"mute={mute}"))
    assert not (place / "out").exists()


def test_the_other_processes_of_a_launch_leave_it_to_the_first(place, tiny_checkpoint, monkeypatch, capsys):
    argv = options(place, f"native={tiny_checkpoint}", tasks=["arc_easy"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert command_line.main(argv) == 0
    assert not (place / "out").exists()
    monkeypatch.setenv("RANK", "0")
    assert command_line.main(argv) == 0
    assert "2 processes were started; only the first one evaluates" in capsys.readouterr().err
    assert report(place)["arms"][0]["runs"][0]["status"] == "done"


def test_wrong_input_is_one_line_and_writes_nothing(place, tiny_checkpoint, tmp_path, capsys):
    good = options(place, f"native={tiny_checkpoint}")
    other = options(place, "gone=./nowhere")
    assert "no such directory" in refused(capsys, *other)
    assert "--baseline gelu is not one of the models: native" in refused(capsys, *good, "--baseline", "gelu")
    assert "--reference x is not one of" in refused(capsys, *good, "--reference", "x")
    assert "no such task" in refused(capsys, *good[:-4], "--tasks", "pica")
    assert "no such suite" in refused(capsys, "eval", "--models", "a=b", "--suite", "x", "--output_dir", "o")
    assert "--models /x/: write name=path" in refused(capsys, *options(place, "a/b=/x/")).replace("a/b=", "")
    assert "a name is one line" in refused(capsys, *options(place, "a" * 300 + "=x"))
    assert "a name is one line" in refused(capsys, *options(place, "a\0b=x"))
    assert "is not a number above 0" in refused(capsys, *good, "--beta", "nan")
    assert "two models are called a" in refused(capsys, *options(place, "a=x", "a=y"))
    assert "not a whole number" in refused(capsys, *good, "--limit", "0")
    assert "no such directory" in refused(capsys, *good, "--data_dir", "gone")
    (place / "data" / "blimp" / "blimp.jsonl.gz").unlink()
    line = refused(capsys, *good)
    assert "no blimp/blimp.jsonl.gz, needed by blimp" in line and "--tasks" in line
    adapter = place / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "does not name the base model" in refused(capsys, *options(place, f"a={adapter}", tasks=["arc_easy"]))
    (adapter / "adapter_config.json").write_text('{"base')
    assert "save the adapter again" in refused(capsys, *options(place, f"a={adapter}", tasks=["arc_easy"]))
    assert not (place / "out").exists()


def test_a_tokenizer_without_a_chat_template(place, tiny_checkpoint, capsys):
    plain = place / "plain"
    shutil.copytree(tiny_checkpoint, plain)
    (plain / "chat_template.jinja").unlink()
    argv = options(place, f"plain={plain}", tasks=["arc_easy"])
    assert "plain" in refused(capsys, *argv, "--apply_chat_template")


def test_damaged_files_are_computed_again_or_one_line(place, tiny_checkpoint, capsys):
    argv = options(place, f"native={tiny_checkpoint}", tasks=["arc_easy"])
    assert command_line.main(argv) == 0
    first = numbers(place)
    (path,) = (place / "out" / "results" / "native").glob("arc_easy-*.json")
    path.write_text('{"key": {}, "result": {}}')
    assert command_line.main(["report", str(place / "out")]) == 0
    assert "arc_easy: not run yet" in report(place)["arms"][0]["runs"][0]["error"]
    capsys.readouterr()
    assert command_line.main(argv) == 0
    assert "arc_easy: kept" not in capsys.readouterr().err
    assert numbers(place) == first
    settings = place / "out" / "evaluation.json"
    for text in ('{"models": {}}', "{"):
        settings.write_text(text)
        assert "damaged, or of another version" in refused(capsys, "report", place / "out")
    assert command_line.main(argv) == 0
    assert "arc_easy: kept" in capsys.readouterr().err


def test_a_report_of_nothing(place, capsys):
    assert "gone: no such directory; give the output_dir" in refused(capsys, "report", place / "gone")
    assert "holds no comparison and no evaluation" in refused(capsys, "report", place / "data")


def test_the_bars_of_requests_follow_tqdm_disable(place, tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert command_line.main(options(place, f"native={tiny_checkpoint}", tasks=["arc_easy", "wikitext"])) == 0
    assert "Running loglikelihood requests" not in capsys.readouterr().err
