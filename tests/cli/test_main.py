"""The command line itself: help, version, wrong commands, exit statuses, and that it starts fast."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from crrelu_llm import __version__
from crrelu_llm.cli import main as command_line
from crrelu_llm.errors import InputError
from crrelu_llm.training.kinds import KINDS

OWN_PARSER = sorted(set(command_line.COMMANDS) - set(KINDS))  # those build TRL's parser
HEAVY = "{'torch', 'transformers', 'trl', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)"


def one_line(capsys):
    """The single line on stderr, where nothing was printed on stdout."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def test_help_lists_every_command(capsys):
    assert command_line.main([]) == 0
    without = capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        command_line.main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == without
    for name, (_, summary) in command_line.COMMANDS.items():
        assert f"{name} {summary}" in " ".join(without.split())


def test_version(capsys):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("command", OWN_PARSER)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main([command, "--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(f"usage: crrelu {command} ")
    assert f"example: crrelu {command}" in out


def test_helps_load_nothing_heavy():
    code = (
        "import sys; from crrelu_llm.cli.main import main\n"
        f"for argv in [['--help'], *([name, '--help'] for name in {OWN_PARSER})]:\n"
        "    try:\n        main(argv)\n    except SystemExit: pass\n"
        f"    if {HEAVY}: sys.exit(str((argv, {HEAVY})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: crrelu") == len(OWN_PARSER) + 1


@pytest.mark.parametrize("argv", [["pach"], ["--hepl"], ["--verbose", "patch"]])
def test_a_wrong_command_is_one_line(argv, capsys):
    assert command_line.main(argv) == 2
    error = one_line(capsys)
    assert error.startswith("crrelu: ")
    assert "see `crrelu --help`" in error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["patch"], "the following arguments are required: MODEL, --output_dir"),
        (["inspect"], "the following arguments are required: MODEL"),
        (["inspect", "x", "--jsno"], "unrecognized arguments: --jsno"),
        (["report"], "the following arguments are required: D"),
        (["compare", "ppo"], "invalid choice: 'ppo'"),
        (["compare", "sft", "--config", "x", "--arms", "gelu", "--output_dir", "d", "--seeds", "one"], "'one'"),
        (["quickstart", "--seeds", "a"], "'a'"),
        (["recipes"], "the following arguments are required: list|show|copy"),
        (["recipes", "show"], "the following arguments are required: NAME"),
    ],
)
def test_wrong_options_are_one_line(argv, words, capsys):
    assert command_line.main(argv) == 2
    error = one_line(capsys)
    assert error.startswith(f"crrelu {argv[0]}: ")
    assert words in error
    assert f"see `crrelu {argv[0]}" in error


def test_options_are_not_abbreviated(capsys):
    """A shortened option would change its meaning when a new option is added."""
    assert command_line.main(["patch", "x", "--output", "y"]) == 2
    assert "--output_dir" in one_line(capsys)


def test_dashes_become_underscores_in_options_alone():
    given = ["my-model", "--output-dir", "my-dir", "--data=a-b", "--per-device-x=1-2", "-n", "-1", "--", "a-b"]
    expected = ["my-model", "--output_dir", "my-dir", "--data=a-b", "--per_device_x=1-2", "-n", "-1", "--", "a-b"]
    assert command_line._underscores(given) == expected


def failing(error):
    def run(argv):
        raise error

    return SimpleNamespace(run=run)


def test_exit_statuses(capsys):
    assert command_line._run(failing(InputError("wrong; mend it.")), "patch", []) == 2
    assert one_line(capsys) == "crrelu patch: wrong; mend it.\n"
    assert command_line._run(failing(KeyboardInterrupt()), "patch", []) == 130
    assert "interrupted; nothing half-written" in capsys.readouterr().err
    assert command_line._run(failing(RuntimeError("two\nlines")), "patch", []) == 1
    assert "crrelu patch: failed: RuntimeError: two lines\n" in capsys.readouterr().err
    assert command_line._run(SimpleNamespace(run=lambda argv: None), "patch", []) == 0


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "crrelu_llm", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("crrelu: ") and done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m crrelu_llm recipes show smollm2-135m/dpo/config_lora | head -n 1 > /dev/null"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
