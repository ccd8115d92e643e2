"""Options that several commands share: each has one text and one default."""

import contextlib
from dataclasses import fields

from crrelu_llm.cli import main as command_line
from crrelu_llm.patch_options import OPTIONS
from crrelu_llm.patching import PatchConfig


def printed_help(command, capsys):
    with contextlib.suppress(SystemExit):  # argparse's own help exits
        command_line.main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_the_defaults_of_a_patch_are_those_of_its_config():
    defaults = {entry.name: entry.default for entry in fields(PatchConfig) if entry.name != "activation"}
    assert {name: default for name, (default, _) in OPTIONS.items()} == defaults


def test_a_patch_and_a_recipe_tell_the_same_of_an_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    patch, recipe = printed_help("patch", capsys), printed_help("sft", capsys)
    for _, text in OPTIONS.values():
        assert text in patch
        assert text[1:] in recipe
