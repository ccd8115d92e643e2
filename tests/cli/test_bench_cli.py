"""`crrelu bench` as a user runs it: the promised fields with sane values, table, picture, wrong input in one line."""

import json

import pytest
import torch

from crrelu_llm.cli import main as command_line
from crrelu_llm.kernels import choice

pytestmark = pytest.mark.usefixtures("nothing_frozen")
PROMISED = {
    "name", "backend", "dtype", "shape", "direction", "milliseconds", "ratio_to_gelu", "gigabytes_per_second",
    "fraction_of_copy_bandwidth", "peak_memory_bytes",
}  # fmt: skip
DOCUMENT = {"device", "bench", "command", "environment", "epsilon_per", "repeats", "cases", "left_out"}


def bench(*argv):
    return command_line.main(["bench", *map(str, argv), "--device", "cpu"])


@pytest.fixture
def without_compilers(monkeypatch):
    """Compiling takes seconds a case; what cannot be compiled is left out, with the reason."""

    def refuse(*args):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("crrelu_llm.bench.functions._compiled", lambda function: refuse)
    choice._module_unavailable.cache_clear()
    monkeypatch.setattr("crrelu_llm.kernels.inductor.unavailable", lambda device: "no C++ compiler")
    yield
    choice._module_unavailable.cache_clear()


def check(case):
    assert set(case) >= PROMISED
    assert case["direction"] in ("forward", "backward", "both")
    assert 0 < case["milliseconds_low"] <= case["milliseconds"] <= case["milliseconds_high"]
    assert isinstance(case["peak_memory_bytes"], int) and case["peak_memory_bytes"] > 0


def by(cases, *keys):
    found = {tuple(case[key] for key in keys): case for case in cases}
    assert len(found) == len(cases)
    return found


def test_op(without_compilers, tmp_path, capsys):
    out = tmp_path / "new" / "bench"
    options = ["--repeats", "2", "--epsilon_per", "channel", "--output_dir", out, "--plot"]
    assert bench("op", "--shapes", "12x8", "5x3x4", *options) == 0
    document = json.loads((out / "bench.json").read_text())
    assert set(document) == DOCUMENT | {"errors"}
    assert document["device"] == "cpu"
    for case in document["cases"]:
        check(case)
    keys = ("name", "backend", "dtype", "direction", "kind", "shape")
    assert len({str([case[key] for key in keys]) for case in document["cases"]}) == len(document["cases"])
    first = [case for case in document["cases"] if case["shape"] == [12, 8] and case["dtype"] == "float32"]
    cases = by([case for case in first if case["name"] != "copy"], "name", "backend", "direction")
    names = ["gelu", "gelu_tanh", "silu", "relu", "geglu", "swiglu"]
    ours = ["crrelu", "crrelu_gated", "crrelu_packed"]
    expected = {(name, "torch") for name in names} | {(name, key) for name in ours for key in ("reference", "eager")}
    assert {key[:2] for key in cases} == expected
    for (name, _, direction), case in cases.items():
        gated = name in ("geglu", "swiglu", "crrelu_gated", "crrelu_packed")
        gelu = cases["geglu" if gated else "gelu", "torch", direction]
        assert case["ratio_to_gelu"] == case["milliseconds"] / gelu["milliseconds"]
        tensors = {"forward": 2 + gated, "backward": 3 + 2 * gated, "both": 5 + 3 * gated}[direction]
        speed = tensors * 12 * 8 * 4 / case["milliseconds"] / 1e6
        assert case["gigabytes_per_second"] == pytest.approx(speed)
        share = case["gigabytes_per_second"] / case["copy_gigabytes_per_second"]
        assert case["fraction_of_copy_bandwidth"] == pytest.approx(share)
    assert cases["relu", "torch", "forward"]["peak_memory_bytes"] == 12 * 8 * 4
    assert choice.override() is None

    errors = by(document["errors"], "name", "backend", "dtype")
    for dtype, epsilon in (("float32", 1e-5), ("bfloat16", 0.03)):
        gelu, eager = errors["gelu", "torch", dtype], errors["crrelu", "eager", dtype]
        for key in ("value_max", "value_mean", "gradient_max", "gradient_mean"):
            assert 0 < eager[key] <= 1.1 * gelu[key]
        assert gelu["epsilon_gradient"] is None and eager["epsilon_gradient"] < epsilon
    assert errors["crrelu", "eager", "bfloat16"]["epsilon_gradient"] < 1e-5  # summed in float32

    reasons = {(entry["name"], entry["backend"]): entry["reason"] for entry in document["left_out"]}
    assert reasons["crrelu", "inductor"] == "no C++ compiler"
    assert reasons["crrelu", "torch.compile"] == "RuntimeError: no compiler here"
    assert reasons["geglu and swiglu", "liger"] == "no GPU (cpu)"
    picture = (out / "bench.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]
    printed = capsys.readouterr()
    assert (
        "activation, bfloat16, 5x3x4" in printed.out and "left out: crrelu, inductor: no C++ compiler" in printed.out
    )
    assert all(line.startswith("bench: ") for line in printed.err.splitlines()), printed.err


def test_mlp(tmp_path, capsys):
    sizes = [
        "--layers",
        "2",
        "--hidden",
        "8",
        "--width",
        "24",
        "--tokens",
        "10",
        "--repeats",
        "2",
        "--dtypes",
        "float32",
        "bfloat16",
    ]
    assert bench("mlp", *sizes, "--json", "--output_dir", tmp_path, "--plot") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "bench.json").read_text())
    assert set(document) == DOCUMENT
    cases = by(document["cases"], "name", "kind", "dtype")
    assert {key[0] for key in cases} >= {"native", "gelu", "crrelu"}
    for (_, kind, dtype), case in cases.items():
        check(case)
        assert case["shape"] == [2, 10, 8, 24]
        assert case["ratio_to_gelu"] == case["milliseconds"] / cases["gelu", kind, dtype]["milliseconds"]
        assert case["gigabytes_per_second"] is case["fraction_of_copy_bandwidth"] is None
    assert cases["gelu", "plain", "bfloat16"]["backend"] == "torch"
    assert cases["crrelu", "plain", "bfloat16"]["backend"] == "auto"
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_train(tiny_llama_checkpoint, tmp_path, capsys):
    sizes = ["--batch_size", "2", "--length", "16", "--repeats", "2", "--output_dir", tmp_path, "--plot"]
    assert bench("train", tiny_llama_checkpoint, *sizes) == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    cases = by(document["cases"], "name")
    assert {key[0] for key in cases} >= {"native", "gelu", "crrelu"}
    for case in document["cases"]:
        check(case)
        assert (case["shape"], case["direction"], case["dtype"]) == ([2, 16], "both", "float32")
        assert case["tokens_per_second"] == pytest.approx(32 / case["milliseconds"] * 1e3)
    peaks = [cases[name,]["peak_memory_bytes"] for name in ("native", "gelu")]
    assert abs(peaks[0] - peaks[1]) < 2000  # SiLU and GELU keep the same tensors
    assert "tokens/s" in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: op|mlp|train"),
        (["ops"], "invalid choice: 'ops'"),
        (["op", "--shapes", "12"], "'12' is not a shape; write rows x columns"),
        (["op", "--shapes", "0x3"], "'0x3' is not a shape"),
        (["op", "--dtypes", "float8"], "'float8'"),
        (["op", "--repeats", "0"], "'0' is not a whole number of 1 or more"),
        (["op", "--plot"], "give --output_dir too"),
        (["mlp", "--hidden", "-1"], "--hidden"),
        (["mlp", "--epsilon_per", "row"], "'row'"),
        (["train"], "the following arguments are required: MODEL"),
        (["train", "./nothing"], "no such directory: ./nothing"),
        (["train", "builtin:nano", "--length", "100000"], "--length 100000: builtin:nano takes at most"),
    ],
)
def test_wrong_input_is_one_line(argv, words, capsys):
    assert command_line.main(["bench", *argv]) == 2
    printed = capsys.readouterr()
    *progress, line = printed.err.splitlines()
    assert printed.out == ""
    assert all(entry.startswith("bench: ") for entry in progress)
    assert line.startswith("crrelu bench: ") and words in line


def test_a_file_is_no_output_dir(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert bench("op", "--output_dir", tmp_path / "file") == 2
    assert "choose another --output_dir" in capsys.readouterr().err


def test_a_wrong_backend_in_the_environment_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("CRRELU_BACKEND", "egar")
    assert bench("mlp") == 2
    assert capsys.readouterr().err.startswith("crrelu bench: CRRELU_BACKEND: unknown backend 'egar'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_one_line(capsys):
    assert command_line.main(["bench", "mlp", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
