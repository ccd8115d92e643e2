"""The examples of the README and of docs/: found, and the commands in them parsed as the real ones would be."""

import re
import shlex
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crrelu_llm.cli import main as command_line
from crrelu_llm.cli.parser import Parser
from crrelu_llm.training.kinds import KINDS

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PARSED = [*PAGES, "CONTRIBUTING.md"]
_BLOCK = re.compile(
    r"(?P<comments>(?:^<!--[^\n]*-->\n)*)^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
# What is no command or file of ours.
SETUP = (("python3", "-m", "venv"), (".",), ("vllm", "serve"), ("pre-commit", "install"))
TOOLS = (("ruff", "check"), ("ruff", "format"), ("mypy",), ("mkdocs", "serve"), ("mkdocs", "build"))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `not_run` is the reason why it is not run, where it has one."""

    page: str
    line: int
    language: str
    title: str | None
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page):
    """The fenced blocks of a page, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        reason = _NOT_RUN.search(match["comments"])
        line = text.count("\n", 0, match.start("language")) + 1
        parts = match["language"], match["title"], match["text"]
        found.append(Block(page, line, *parts, reason and reason[1]))
    assert len(found) * 2 == len(re.findall(r"^```", text, re.M)), f"{page}: a block without a language"
    return found


def commands(text):
    """The commands of a shell block, as words: comments left out, lines joined, `&&` and line ends apart."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s", line):
            if words := shlex.split(part, comments=True):
                found.append(words)
    return found


class _Parsed(BaseException):
    """Raised in place of what a command would do next."""


@contextmanager
def _parsing_alone():
    """Every command of ours ends when its parser has read its options; gives what these are."""
    depth, found, originals = [0], [], (Parser.parse_args, Parser.parse_known_args)

    def stopping(original):
        def parse(self, *args, **kwargs):
            depth[0] += 1
            try:
                result = original(self, *args, **kwargs)
            finally:
                depth[0] -= 1
            if depth[0] == 0:  # not the parsers that a parser calls
                found.append(result if isinstance(result, tuple) else (result, []))
                raise _Parsed
            return result

        return parse

    Parser.parse_args, Parser.parse_known_args = map(stopping, originals)
    try:
        yield found
    finally:
        Parser.parse_args, Parser.parse_known_args = originals


def check(words):
    """Asserts that a command would be taken: its options, its recipe, the files that it names.

    The recipes must be there: the working directory is one in which the page's commands could be given.
    """
    if words[0] == "crrelu":
        _check_ours(command_line._underscores(words[1:]))
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(words[2:])
        assert launch.module and launch.training_script == "crrelu_llm" and Path(launch.config_file).is_file()
        _check_ours(launch.training_script_args)
    elif words[:3] == ["python", "-m", "pytest"]:
        paths = [word for word in words[3:] if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths), paths
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).is_file(), words[1]
    elif words[:2] == ["pip", "install"]:
        _check_installation(words[2:])
    else:
        known = any(tuple(words[: len(start)]) == start for start in SETUP + TOOLS)
        assert known, f"nothing checks {shlex.join(words)}"


def _check_ours(argv):
    name = argv[0]
    assert name in command_line.COMMANDS, name
    if name in KINDS:
        _check_training(name, argv[1:])
        return
    if name == "recipes":  # fast, and later commands need what it copies
        assert command_line.main(argv) == 0
        return
    with _parsing_alone() as found:
        try:
            status = command_line.main(argv)
        except _Parsed:
            status = None
    assert status is None, f"refused: {shlex.join(argv)}"
    (args, rest) = found[0]
    if name == "compare":
        _check_comparison(args, rest)
    elif argv[:2] == ["eafo", "epsilon"]:
        _check_training("sft", ["--config", args.config, *rest])
    elif name == "eval":
        from crrelu_llm.evaluation.models import parse_models
        from crrelu_llm.evaluation.suites import read_suite

        read_suite(args.suite, args.tasks, args.data)
        assert len(parse_models([model.partition("=")[0] + "=builtin:nano" for model in args.models])) > 1


def _check_comparison(args, rest):
    from crrelu_llm.comparison.arms import check_baseline, check_grid, parse_arms, parse_grid
    from crrelu_llm.comparison.tuning import parse_tune

    arms = parse_arms(args.arms)
    check_baseline(arms, args.baseline)
    check_grid(parse_grid(args.grid), arms)
    parse_tune(args.tune)
    for arm in arms:
        _check_training(args.kind, ["--config", args.config, *rest, *arm.argv])


def _check_training(kind, argv):
    from crrelu_llm.training import launch
    from crrelu_llm.training.arguments import make_parser, parse, read_recipe

    own = {action.dest for action in make_parser(kind)._actions}
    options, rest = launch._split(argv, own)
    if launch.CONFIG_KEY in options:
        launch._config_file(options[launch.CONFIG_KEY])
    # bf16, the recipes' default on GPUs, is refused on a machine without one unless the CPU is asked for.
    on_cpu = [] if "use_cpu" in read_recipe(rest)[1] else ["--use_cpu", "true"]
    parse(kind, [*rest, *on_cpu])


def _check_installation(words):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for index, word in enumerate(words):
        if word == "-c":
            assert (ROOT / words[index + 1]).is_file(), words[index + 1]
        for extra in re.findall(r"\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= set(extras), word
