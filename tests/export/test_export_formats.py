"""`crrelu export`: what is refused, in one line, before any heavy work; and what a traced graph holds."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, token_ids
from transformers import AutoModelForCausalLM

import crrelu_llm
from crrelu_llm import files
from crrelu_llm.cli import main as command_line
from crrelu_llm.errors import InputError
from crrelu_llm.export import check, export, formats, graph, transformers_format
from crrelu_llm.files import alone


def patched(family, epsilon_per="layer", calibrated=False, **overrides):
    """A tiny patched model whose ε, and where asked for whose four numbers a channel, are far from the start."""
    model = tiny_model(family, **overrides)
    ids = token_ids(batch=8, length=16) if calibrated else None
    calibration = "fit" if calibrated else "none"
    crrelu_llm.patch(model, "crrelu", calibration=calibration, epsilon_per=epsilon_per, epsilon_init=0.3, blocks=ids)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A patched tiny Llama, without a tokenizer."""
    path = tmp_path_factory.mktemp("patched") / "llama"
    patched("llama").save_pretrained(path)
    return path


@pytest.fixture
def all_installed(monkeypatch):
    """As if every package of every format were there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(formats, "has_exporter", lambda name: True)


def refused(capsys, *argv):
    """The one line that a wrong call is answered with."""
    assert command_line.main(["export", *map(str, argv)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_gguf_is_answered_with_the_way_back(capsys, tmp_path):
    line = refused(capsys, "m", "--format", "gguf", "--output-dir", tmp_path / "out")
    assert "crrelu patch MODEL --activation silu --calibration none" in line and "perplexity" in line


def test_unknown_format(capsys, tmp_path):
    line = refused(capsys, "m", "--format", "tflite", "--output_dir", tmp_path / "out")
    assert "choose onnx, openvino, executorch, transformers" in line


@pytest.mark.parametrize("name", ["onnx", "openvino", "executorch"])
def test_a_missing_runtime_is_told_before_the_model_is_looked_for(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    line = refused(capsys, "/no/such/model", "--format", name, "--output_dir", tmp_path / "out")
    assert f"pip install {' '.join(formats.FORMATS[name].packages)}" in line
    assert formats.FORMATS[name].runtime in line


def test_a_transformers_without_exporters(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    monkeypatch.setitem(sys.modules, "transformers.exporters.auto", None)
    line = refused(capsys, "m", "--format", "onnx", "--output_dir", tmp_path / "out")
    assert "needs transformers 5.23 or newer" in line


def test_a_dtype_that_the_runtime_does_not_run(capsys, tmp_path, all_installed):
    line = refused(capsys, "m", "--format", "executorch", "--dtype", "bfloat16", "--output_dir", tmp_path / "out")
    assert "--dtype bfloat16" in line and "float32" in line


def test_an_output_directory_that_holds_something(capsys, tmp_path, all_installed):
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, "m", "--format", "onnx", "--output_dir", tmp_path)
    assert "already exists" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unpatched_model_is_sent_to_transformers_own_exporters(capsys, tmp_path, all_installed):
    line = refused(capsys, "builtin:nano", "--format", "onnx", "--output_dir", tmp_path / "out")
    assert "not patched" in line and "transformers.exporters" in line
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_model():
    model = SimpleNamespace(config=SimpleNamespace(quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(InputError, match="quantised"):
        graph.require_exportable(model, "m")


def test_a_format_that_cannot_hold_the_model(capsys, tmp_path, checkpoint, monkeypatch):
    auto = pytest.importorskip("transformers.exporters.auto")

    def fails(*args):
        raise RuntimeError("no operator\nfor aten::nonzero")

    monkeypatch.setattr(auto.AutoHfExporter, "from_config", lambda made: SimpleNamespace(export=fails))
    monkeypatch.setattr(export, "require", lambda name, dtype: formats.FORMATS[name])
    monkeypatch.setattr(formats, "require", export.require)
    assert (
        command_line.main(["export", str(checkpoint), "--format", "onnx", "--output_dir", str(tmp_path / "out")]) == 2
    )
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "onnx cannot hold this llama: no operator for aten::nonzero; choose another --format" in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def half_exported(monkeypatch, all_installed):
    """As if a format stopped in the middle of its file."""

    class Exported:
        def save_pretrained(self, directory):
            directory.mkdir()
            (directory / "model.onnx").write_text("half")
            raise ValueError("no such operator")

    monkeypatch.setattr(graph, "trace", lambda *args: Exported())


def test_nothing_is_left_of_an_export_that_fails(tmp_path, checkpoint, half_exported):
    with pytest.raises(ValueError, match="no such operator"):
        export.export_model(str(checkpoint), "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_goes_with_the_next_one(capsys, tmp_path, checkpoint, half_exported, monkeypatch):
    call = (str(checkpoint), "onnx", tmp_path / "out")
    with monkeypatch.context() as killed, pytest.raises(ValueError, match="no such operator"):
        killed.setattr(files, "remove", lambda path: None)  # what comes after a kill is never reached
        export.export_model(*call)
    (left,) = tmp_path.iterdir()
    left.rename(tmp_path / ".out.1.tmp")
    (tmp_path / ".out.onnx.1.tmp").mkdir()  # of an export to out.onnx, which may still run
    with alone(tmp_path, "crrelu export", ".out.lock"):  # held as long as the first one runs
        line = refused(capsys, checkpoint, "--format", "onnx", "--output_dir", tmp_path / "out")
    assert "another `crrelu export` is at work there" in line
    assert (tmp_path / ".out.1.tmp" / "model.onnx").read_text() == "half"
    with pytest.raises(ValueError, match="no such operator"):
        export.export_model(*call)
    assert [path.name for path in tmp_path.iterdir()] == [".out.onnx.1.tmp"]


class Wrong:
    """A runtime whose logits are those of torch and something more."""

    def __init__(self, model, more):
        self.inner, self.more = export.runtimes.Torch(model), more

    def begin(self):
        self.inner.begin()

    def __call__(self, ids):
        return self.inner(ids) + self.more


def test_an_export_that_computes_something_else_is_refused():
    model = patched("llama")
    ids = check.tokens(None, 97)
    for more in (0.1, float("nan")):
        with pytest.raises(InputError, match="logits of the export differ"):
            check.compare(export.runtimes.Torch(model), Wrong(model, more), ids, "float32", "m")


def test_the_report_of_a_runtime_that_agrees():
    model = patched("gpt2")
    found = check.compare(export.runtimes.Torch(model), Wrong(model, 1e-5), check.tokens(None, 97), "float32", "m")
    assert found["greedy_equal"] and found["compared_tokens"] == 64
    assert 5e-6 < found["largest_logit_difference"] < 2e-5
    assert set(found["tokens_per_second"]) == {"torch", "runtime"}
    assert json.dumps(found)


# family, ε per, calibrated, sizes: of one layer, and few channels to calibrate
FAMILIES = [
    ("llama", "channel", True, {"num_hidden_layers": 1}),
    ("gpt2", "layer", True, {"n_layer": 1, "n_inner": 16}),
    ("phi3", "channel", False, {"num_hidden_layers": 1}),
]


@pytest.mark.parametrize(("family", "epsilon_per", "calibrated", "sizes"), FAMILIES)
def test_the_graph_holds_plain_operations_and_computes_the_same(family, epsilon_per, calibrated, sizes):
    model = patched(family, epsilon_per, calibrated, **sizes)
    ids = token_ids(batch=1, length=10)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
        found = program.module()(input_ids=ids, use_cache=False).logits
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("aten.exp.") for name in targets)  # the formula itself
    assert {name.partition(".")[0] for name in targets} <= {"aten", "<built-in function getitem>"}
    assert not [node for node in program.graph.nodes if node.op == "call_module"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_the_traced_call_continues_a_text(family):
    model = patched(family)
    inputs = graph.sample(model, "onnx")
    assert inputs["attention_mask"].shape[1] > inputs["input_ids"].shape[1]
    empty = graph.empty_cache(model)
    assert all(layer.keys.shape[2] == 0 for layer in empty.layers)
    ids = token_ids(batch=1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, past_key_values=empty).logits, model(input_ids=ids, use_cache=False).logits
        )


def test_a_cache_of_another_kind_is_left_out():
    from tiny import tiny_lfm2

    assert "past_key_values" not in graph.sample(tiny_lfm2(), "onnx")


class InThisProcess(export.runtimes.Torch):
    """In place of the process without the package, which takes its time to start."""

    def __init__(self, directory):
        super().__init__(AutoModelForCausalLM.from_pretrained(directory).eval())

    def close(self):
        pass


@pytest.mark.parametrize("process", [InThisProcess, pytest.param(transformers_format.Apart, marks=pytest.mark.slow)])
def test_transformers_checkpoint(process, checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("crrelu_llm.patching.standalone", reason="needs crrelu patch --standalone")
    monkeypatch.setattr(transformers_format, "Apart", process)
    out = tmp_path / "out"
    assert command_line.main(["export", str(checkpoint), "--format", "transformers", "--output_dir", str(out)]) == 0
    report = json.loads((out / "export_report.json").read_text())
    assert report["greedy_equal"] and report["largest_logit_difference"] < 1e-5
    assert "modeling_crrelu.py" in [entry["name"] for entry in report["files"]]
    assert AutoModelForCausalLM.from_pretrained(out).config.crrelu["activation"] == "crrelu"
    assert "greedy continuation, 32 tokens: equal" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_that_does_not_load_apart_is_told_in_one_line(tmp_path):
    apart = transformers_format.Apart(tmp_path)
    try:
        with pytest.raises(InputError, match=r"does not load without crrelu_llm: .*config\.json"):
            apart(torch.tensor([[1, 2]]))
    finally:
        apart.close()
