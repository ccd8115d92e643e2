"""Real exports on their real runtimes: `pip install -e '.[test,export,executorch]'`, then
`python -m pytest -m export tests/export`."""

import json

import pytest
from tiny import tiny_model, token_ids

import crrelu_llm
from crrelu_llm.cli import main as command_line

pytestmark = pytest.mark.export

# family, ε per, calibrated, changes to the config
MODELS = {
    "llama": ("channel", True, {}),
    "gpt2": ("layer", True, {}),
    "gemma3_text": ("layer", False, {"sliding_window": 24}),  # the check's 64 tokens go beyond the window
    "phi3": ("channel", True, {}),
    "gpt_neox": ("layer", False, {}),
    "mixtral": ("layer", False, {}),  # fused experts
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The patched tiny model of a family, made when it is first asked for."""
    made = {}

    def make(family):
        if family not in made:
            epsilon_per, calibrated, changes = MODELS[family]
            model = tiny_model(family, **changes)
            crrelu_llm.patch(
                model,
                "crrelu",
                epsilon_per=epsilon_per,
                epsilon_init=0.3,
                calibration="fit" if calibrated else "none",
                blocks=token_ids(batch=8, length=16) if calibrated else None,
            )
            made[family] = tmp_path_factory.mktemp("patched") / family
            model.save_pretrained(made[family])
        return made[family]

    return make


def exported(model, format_name, out, *options):
    """The report of an export, as it lies beside it."""
    argv = ["export", model, "--format", format_name, "--output_dir", out, *options]
    assert command_line.main([str(entry) for entry in argv]) == 0
    return json.loads((out / "export_report.json").read_text())


def agrees(report):
    return report["greedy_equal"] and report["largest_logit_difference"] < 1e-5


@pytest.mark.parametrize("family", MODELS)
def test_every_family_in_onnx(family, checkpoints, tmp_path):
    pytest.importorskip("onnxruntime")
    report = exported(checkpoints(family), "onnx", tmp_path / "out")
    assert agrees(report) and report["cache"]
    import onnx

    found = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {node.domain for node in found.graph.node} <= {"", "ai.onnx"}  # nothing of ours, nothing of one runtime


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_openvino(family, checkpoints, tmp_path):
    pytest.importorskip("openvino")
    report = exported(checkpoints(family), "openvino", tmp_path / "out")
    assert agrees(report) and report["cache"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_executorch(family, checkpoints, tmp_path):
    pytest.importorskip("executorch")
    report = exported(checkpoints(family), "executorch", tmp_path / "out", "--max_length", "100")
    assert agrees(report) and not report["cache"] and report["max_length"] == 100


@pytest.mark.parametrize(
    ("format_name", "dtype", "weights"),
    [
        ("onnx", "float16", "model.onnx.data"),
        ("openvino", "float16", "openvino_model.bin"),
        ("openvino", "bfloat16", "openvino_model.bin"),
    ],
)
def test_half_precision(format_name, dtype, weights, checkpoints, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime"}.get(format_name, format_name))
    report = exported(checkpoints("llama"), format_name, tmp_path / "out", "--dtype", dtype)
    assert 0 < report["largest_logit_difference"] < 0.05
    size = {entry["name"]: entry["bytes"] for entry in report["files"]}[weights]
    assert size < 0.6 * 4 * sum(part.numel() for part in tiny_model("llama").parameters())
