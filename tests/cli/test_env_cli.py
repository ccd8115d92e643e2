"""`crrelu env` as a user runs it."""

import json
from importlib.metadata import version

import pytest
import torch

from crrelu_llm import __version__
from crrelu_llm.cli import main as command_line
from crrelu_llm.kernels import choice


def env(capsys, *argv):
    assert command_line.main(["env", *argv]) == 0
    return capsys.readouterr().out


def document(capsys):
    return json.loads(env(capsys, "--json"))


def test_text_and_json_say_the_same(capsys):
    found = document(capsys)
    text = env(capsys)
    assert found["environment"]["versions"]["torch"] == version("torch") and version("torch") in text
    assert found["environment"]["processor"] in text and __version__ in text
    assert found["problems"] == [] and "that this package relies on: all there" in text
    assert found["override"] is None and "CRReLU backend: the best one for each call" in text
    cpu = [row for row in found["backends"] if row["device"] == "cpu"]
    assert {(row["dtype"], row["size"]) for row in cpu} == {
        (dtype, size) for dtype in ("float32", "bfloat16") for size in ("small", "large")
    }
    for row in cpu:
        expected = choice.choose(torch.device("cpu"), getattr(torch, row["dtype"]), row["elements"])
        assert (row["backend"], row["reason"]) == expected
        assert f"{row['backend']}: {row['reason']}" in text
    assert len({row["device"] for row in found["backends"]}) == 1 + torch.cuda.device_count()


def test_an_override_is_named_with_its_source(monkeypatch, capsys):
    monkeypatch.setenv("CRRELU_BACKEND", "eager")
    assert document(capsys)["override"] == {"backend": "eager", "source": "CRRELU_BACKEND"}
    assert "CRReLU backend: eager, set by CRRELU_BACKEND" in env(capsys)
    with choice.using("reference"):
        found = document(capsys)
    assert found["override"] == {"backend": "reference", "source": "set_backend"}
    assert {(row["backend"], row["reason"]) for row in found["backends"]} == {("reference", "chosen by the user")}


def test_what_a_release_lacks_is_named(monkeypatch, capsys):
    from crrelu_llm.compat import Private, trl

    monkeypatch.setattr(trl, "RELIES_ON", (Private("trl:no_such_thing", "the loss of X"),))
    assert [line.endswith("the loss of X") for line in document(capsys)["problems"]] == [True]
    assert "trl:no_such_thing is gone" in env(capsys)


def test_a_wrong_name_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("CRRELU_BACKEND", "egar")
    assert command_line.main(["env"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("crrelu env: CRRELU_BACKEND: unknown backend 'egar'; choose auto, ")


def test_using_puts_back_what_was_set():
    with choice.using("eager"):
        with pytest.raises(KeyError), choice.using("reference"):
            raise KeyError
        assert choice.override() == ("eager", "set_backend")
    assert choice.override() is None


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    """Where nothing can be installed, the checkout is put on the path: no metadata."""
    from importlib.metadata import PackageNotFoundError

    from crrelu_llm import environment

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", missing)
    assert environment._versions.__wrapped__() == {"crrelu_llm": __version__}
