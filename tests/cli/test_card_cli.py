"""`crrelu card` through the command line."""

import json

import pytest
from huggingface_hub import ModelCard
from synthetic import report_of

from crrelu_llm.cli.main import main
from crrelu_llm.patching import readme


def _run(seed, **metrics):
    return {"seed": seed, "status": "done", "metrics": metrics}


@pytest.fixture
def checkpoint(tiny_llama_checkpoint, tmp_path):
    path = tmp_path / "tiny | crrelu"
    argv = ["patch", str(tiny_llama_checkpoint), "--output_dir", str(path), "--calibration", "none"]
    assert main([*argv, "--epsilon_init", "0.25", "--perplexity_data", "none"]) == 0
    return path


@pytest.fixture
def report(tmp_path):
    arms = [
        {"arm": "native", "activation": "silu", "runs": [_run(0, loss=2.0)]},
        {"arm": "crrelu", "activation": "crrelu", "runs": [_run(0, loss=1.0), _run(1, loss=2.0, extra=None)]},
    ]
    path = tmp_path / "comparison" / "report.json"
    path.parent.mkdir()
    data = [{"name": "someone/news", "split": "test", "rows": 3, "sha256": "0"}]
    found = report_of(arms=arms, data=data, verdict="lower | by <b>0.5", command="crrelu compare")
    path.write_text(json.dumps(found.as_dict()))
    return path.parent


def test_the_card_says_what_was_done_and_measured(checkpoint, report, capsys):
    assert main(["card", str(checkpoint), "--report", str(report)]) == 0
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.library_name == "transformers" and "crrelu" in card.data.tags
    assert card.data.datasets == ["someone/news"] and card.data.base_model is None
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("loss", 1.5, "someone/news test")
    assert "| `model.layers.1.mlp.act_fn` | `silu` | 0.25 | 0.25 | 0.25 |" in card.text
    assert "calibration: `none`" in card.text
    assert "lower \\| by &lt;b&gt;0.5" in card.text and "<b>" not in card.text


def test_results_are_those_of_the_grid_values_of_the_checkpoint(checkpoint, report, capsys):
    path = report / "report.json"
    runs = [_run(seed, loss=loss) | {"grid": {"beta": beta}} for seed, beta, loss in ((0, 0.1, 1.0), (0, 1, 9.0))]
    path.write_text(json.dumps(report_of(arms=[{"arm": "c", "activation": "crrelu", "runs": runs}]).as_dict()))
    assert main(["card", str(checkpoint), "--report", str(path)]) == 2
    assert "run.json names none of the report's grid values" in capsys.readouterr().err
    (checkpoint / "run.json").write_text(json.dumps({"grid": {"beta": "1"}}))
    assert main(["card", str(checkpoint), "--report", str(path)]) == 0
    (result,) = ModelCard.load(checkpoint / "README.md").data.eval_results
    assert result.metric_value == 9.0


def test_results_of_an_evaluation_name_the_data_of_their_task(checkpoint, report):
    path = report / "report.json"
    arms = [
        {"arm": "mine", "activation": "crrelu", "runs": [_run(0, **{"arc_easy/acc": 0.25, "hh/logp_margin": 1.0})]}
    ]
    data = [{"name": "arc-easy/test.jsonl.gz"}, {"name": "hh-harmless/eval.jsonl.gz"}]
    data = [entry | {"rows": 4, "sha256": "0"} for entry in data]
    found = report_of(trainer="eval", recipe={"tasks": ["arc_easy", "hh"]}, arms=arms, data=data)
    path.write_text(json.dumps(found.as_dict()))
    assert main(["card", str(checkpoint), "--report", str(path)]) == 0
    card = ModelCard.load(checkpoint / "README.md")
    results = {result.metric_type: result.dataset_name for result in card.data.eval_results}
    assert results == {"acc": "arc-easy/test.jsonl.gz", "logp_margin": "hh-harmless/eval.jsonl.gz"}
    assert card.data.datasets is None  # files are no names of the Hub


def test_the_card_of_an_adapter_has_the_epsilon_under_it(checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig()).save_pretrained(adapter)
    assert main(["card", str(adapter), "--overwrite"]) == 0  # PEFT has written one
    text = (adapter / "README.md").read_text()
    assert "| `model.layers.1.mlp.act_fn` | `silu` | 0.25 | 0.25 | 0.25 |" in text
    assert str(tmp_path) not in text


def test_a_card_that_is_there_is_kept(checkpoint, capsys):
    assert main(["card", str(checkpoint)]) == 0
    before = (checkpoint / "README.md").read_text()
    assert main(["card", str(checkpoint)]) == 2
    assert "already exists; add --overwrite" in capsys.readouterr().err
    assert main(["card", str(checkpoint), "--overwrite"]) == 0
    assert (checkpoint / "README.md").read_text() == before


def test_wrong_input_is_one_line_and_status_2(checkpoint, report, tiny_llama_checkpoint, capsys):
    for argv, message in (
        ([str(tiny_llama_checkpoint)], "not a checkpoint that crrelu_llm patched"),
        ([str(checkpoint / "nowhere")], "no such directory"),
        ([str(checkpoint), "--report", str(checkpoint)], "cannot be read"),
        ([str(checkpoint), "--report", str(report), "--arm", "gelu"], "there are native, crrelu"),
        ([str(checkpoint), "--report", str(report), "--arm", "native"], "its activation is silu"),
        ([str(checkpoint), "--push_to_hub"], "needs --hub_model_id"),
    ):
        capsys.readouterr()
        assert main(["card", *argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0]
    assert readme.is_ours((checkpoint / "README.md").read_text())


def test_damaged_files_are_one_line(checkpoint, report, capsys):
    (report / "report.json").write_text('{"arms": [{"arm": "x"}]}')
    assert main(["card", str(checkpoint), "--report", str(report)]) == 2
    assert main(["card", str(checkpoint), "--output", str(report / "report.json" / "card.md")]) == 1
    (checkpoint / "run.json").write_text('{"status": "failed"}')
    assert main(["card", str(checkpoint), "--output", str(report / "card.md")]) == 0
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["card", str(checkpoint)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def _refused(path, columns, argv, capsys):
    """The one line that is said where a JSON file has other columns; the file is as before afterwards."""
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | columns))
    capsys.readouterr()
    assert main(["card", *map(str, argv)]) == 2, columns
    path.write_text(before)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_files_of_another_shape_are_one_line(checkpoint, report, capsys):
    for columns in (
        {"sites": [{}]},
        {"sites": ["x"]},
        {"sites": [{"path": "x", "scale_mean": "y"}]},
        {"options": [1]},
        {"perplexity": {"before": 1}},
    ):
        line = _refused(checkpoint / "patch_report.json", columns, [checkpoint], capsys)
        assert "patch_report.json: damaged" in line
    for columns in (
        {"data": ["x"]},
        {"data": [{}]},
        {"data": {"name": "x"}},
        {"recipe": [1]},
        {"arms": [{"arm": "crrelu", "runs": [{}]}]},
        {"arms": [{"arm": "crrelu", "runs": [{"status": "done"}]}]},
    ):
        line = _refused(report / "report.json", columns, [checkpoint, "--report", report], capsys)
        assert "--report" in line and "report.json: " in line
    config = json.loads((checkpoint / "config.json").read_text())["crrelu"]
    line = _refused(checkpoint / "config.json", {"crrelu": config | {"sites": [{}]}}, [checkpoint], capsys)
    assert "not a checkpoint that crrelu_llm patched" in line
    assert readme.is_ours((checkpoint / "README.md").read_text())


def test_push_uploads_the_card(checkpoint, monkeypatch):
    pushed = {}
    monkeypatch.setattr(ModelCard, "push_to_hub", lambda self, name, token=None: pushed.update({name: str(self)}))
    assert main(["card", str(checkpoint), "--push_to_hub", "--hub_model_id", "me/tiny"]) == 0
    assert pushed["me/tiny"] == (checkpoint / "README.md").read_text()
