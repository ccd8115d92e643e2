"""The files of an evaluation: what lacks something is computed again, and damaged settings are one line."""

import json

import pytest

from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.measured import Item
from crrelu_llm.evaluation.results import (
    SETTINGS,
    Key,
    LoadedModel,
    Result,
    other_result,
    read_model,
    read_result,
    read_settings,
    write_result,
)

KEY = Key(model={}, dtype="float32", device="cpu", versions={})
ITEM = Item(id=0, group="", prompt="p", options=[], target="", responses=[-1.0])
MEASURED = Result(metrics={"acc": 0.5}, items={"acc": [0.0, 1.0]}, examples=[ITEM, ITEM], seconds=1.0).with_intervals()
MODEL = LoadedModel(activation="crrelu", parameters=3, epsilon={}, path="x")
RESULT = MEASURED.as_dict()
SETTINGS_WHOLE = {
    "models": {"a": "x"}, "tasks": ["t"], "suite": "s", "baseline": "a", "reference": None, "beta": 0.1, "limit": None,
    "chat_template": False, "dtype": "float32", "batch_size": 1, "max_length": None, "device": "cpu", "command": "c",
    "tokenizers": {"a": "0"}, "results": {"a": {"model": "m.json", "t": "t.json"}}, "environment": {}, "failures": {},
    "data": [{"name": "d", "rows": 1, "sha256": "0"}], "created": "now",
}  # fmt: skip


def test_a_whole_result_is_kept(tmp_path):
    write_result(tmp_path / "my-task-0.json", KEY, MEASURED)
    assert read_result(tmp_path / "my-task-0.json") == MEASURED
    write_result(tmp_path / "model-0.json", KEY, MODEL)
    assert read_model(tmp_path / "model-0.json") == MODEL


def test_a_result_is_written_with_its_empty_fields():
    written = [
        "metrics",
        "items",
        "higher_is_better",
        "groups",
        "examples",
        "shares",
        "intervals",
        "per_token",
        "notes",
    ]
    written += ["not_finite", "sparsity", "seconds", "peak_memory_bytes"]
    assert list(RESULT) == written and (RESULT["notes"], RESULT["sparsity"]) == ([], {})
    assert list(KEY.as_dict()) == ["model", "dtype", "device", "versions"]


def test_a_number_that_is_not_finite_is_kept_as_none(tmp_path):
    items = {"acc": [0.0, float("nan")]}
    write_result(tmp_path / "my-task-0.json", KEY, MEASURED.but(items=items, metrics={"acc": float("nan")}))
    found = read_result(tmp_path / "my-task-0.json")
    assert (found.items, found.metrics) == ({"acc": [0.0, None]}, {"acc": None})


DAMAGED = {
    "empty": {},
    "a list": [1],
    "items cut short": RESULT | {"items": {"acc": [0.0]}},
    "items are none": RESULT | {"items": {"acc": 1.0}},
    "examples cut short": RESULT | {"examples": [ITEM.as_dict(), {"id": 1}]},
    "no examples": RESULT | {"examples": []},
    "an interval of one end": RESULT | {"intervals": {"acc": [0.0]}},
    "no time": {key: value for key, value in RESULT.items() if key != "seconds"},
}


@pytest.mark.parametrize("result", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_result_is_none(tmp_path, result):
    path = tmp_path / "my-task-0.json"
    path.write_text(json.dumps({"key": [1], "result": result}))
    assert read_result(path) is None and read_model(path) is None
    assert other_result(tmp_path / "my-task-1.json", KEY) is None


def _without(key):
    return {name: value for name, value in SETTINGS_WHOLE.items() if name != key}


WRONG = {
    "no models": SETTINGS_WHOLE | {"models": {}},
    "only models": {"models": {}},
    "a baseline that is none": SETTINGS_WHOLE | {"baseline": "b"},
    "a reference that is none": SETTINGS_WHOLE | {"reference": "b"},
    "results of another model": SETTINGS_WHOLE | {"results": {"b": {}}},
    "results lack a task": SETTINGS_WHOLE | {"results": {"a": {"model": "m.json"}}},
    "data without a name": SETTINGS_WHOLE | {"data": [{}]},
    "a list": [1],
} | {f"no {key}": _without(key) for key in ("tokenizers", "created", "limit", "failures")}


@pytest.mark.parametrize("settings", WRONG.values(), ids=WRONG)
def test_damaged_settings_are_one_line(tmp_path, settings):
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"evaluation.json: .*damaged.*run the same `crrelu eval` again"):
        read_settings(tmp_path)


def test_settings_that_are_there_or_not(tmp_path):
    with pytest.raises(InputError, match=r"no evaluation.json there"):
        read_settings(tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps(SETTINGS_WHOLE))
    assert read_settings(tmp_path).as_dict() == SETTINGS_WHOLE
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        read_settings(tmp_path)
