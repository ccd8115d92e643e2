"""The README, docs/ and what else strangers read: every example runs or says why not, and no link leads nowhere."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields

import pytest
import yaml
from pages import PAGES, PARSED, ROOT, blocks, check, commands

import crrelu_llm
from crrelu_llm.cli.main import COMMANDS

_spec = importlib.util.spec_from_file_location("repository_links", ROOT / "docs" / "hooks" / "repository.py")
repository = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(repository)

FRONT = [path.relative_to(ROOT).as_posix() for pattern in ("*.md", ".github/**/*.md") for path in ROOT.glob(pattern)]
ROOMS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("crrelu_llm", "recipes", "eval")
    for path in sorted((ROOT / folder).rglob("README.md"))
]
LINKED = list(dict.fromkeys([*PAGES, *FRONT, *ROOMS, *(p for p in repository.reached(PAGES) if p.endswith(".md"))]))


def of(page, *languages):
    return [block for block in blocks(page) if block.language in languages]


def with_blocks(*languages):
    return [page for page in PAGES if any(not block.not_run for block in of(page, *languages))]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty working directory with what a clone has for the examples."""
    for folder in ("recipes", "eval"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(block):
    """A block with a title is a file; it says whether it was one."""
    if block.title:
        with open(block.title, "w", encoding="utf-8") as file:
            file.write(block.text)
    return bool(block.title)


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_examples_run(page, checkout, monkeypatch):
    monkeypatch.setenv("CRRELU_BACKEND", "eager")  # to compile takes longer than the examples
    namespace = {"__name__": "__main__"}
    for block in of(page, "python"):
        if not write(block) and not block.not_run:
            exec(compile(block.text, str(block), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PARSED if of(page, "bash")])
def test_commands_are_taken(page, checkout):
    for block in blocks(page):
        if write(block) or block.language != "bash":
            continue
        for words in commands(block.text):
            check(words)


def test_a_wrong_command_is_found(checkout):
    for command in (
        "crrelu pach builtin:nano",
        "crrelu patch builtin:nano --ouput_dir x",
        "crrelu sft --config recipes/nano/sft.yaml --learning_rat 1",
        "crrelu compare sft --config recipes/nano/sft.yaml --arms gulu --output_dir x",
        "crrelu compare sft --config recipes/nano/sft.yaml --arms gelu --output_dir x --learning_rat 1",
        "crrelu dpo --config recipes/qwen3-0.6b/dpo/config_full.yaml --accelerate_config fsdp9",
        "accelerate launch --config_file recipes/no.yaml -m crrelu_llm sft --config recipes/nano/sft.yaml",
        "python -m pytest tests/no_such_test.py",
        "pip install -c constraints.txt '.[nothing]'",
        "frobnicate",
    ):
        with pytest.raises((AssertionError, crrelu_llm.errors.InputError, SystemExit)):
            check(commands(command)[0])


def test_what_is_not_run_says_why():
    reasons = [block.not_run for page in PAGES for block in of(page, "bash", "python") if block.not_run]
    assert reasons and all(len(reason.split()) > 3 for reason in reasons), reasons
    assert {block.language for page in PAGES for block in blocks(page)} <= {"bash", "python", "yaml", "json", "text"}


@pytest.mark.slow  # trainings, comparisons and evaluations of the embedded model
@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_run(page, checkout):
    tools = checkout / "bin"
    tools.mkdir()
    (tools / "crrelu").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m crrelu_llm "$@"\n')
    (tools / "crrelu").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(checkout / "hf"),
        "CRRELU_BACKEND": "eager",
    }
    for block in blocks(page):
        if write(block) or block.language != "bash" or block.not_run:
            continue
        shell = ["bash", "-euo", "pipefail", "-c", block.text]
        done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def anchors(path):
    """What the headings of a page are linked by, on code hosts and in the site alike."""
    text = re.sub(r"^```.*?^```", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    text = repository._CODE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    folder = (ROOT / page).parent
    for match in repository._LINK.finditer(text):
        link, _, anchor = match["link"].partition("#")
        if repository._ELSEWHERE.match(match["link"]):
            continue
        assert not link or (folder / link).exists(), f"{page}: {link}"
        found = repository.target(page, link) if link else page
        if page in PAGES:  # the site takes files alone
            assert found, f"{page}: {link} is no file, and has no README"
        if anchor:
            assert anchor in anchors(found), f"{page}: {match['link']}"


def test_links_in_the_site():
    text = "[a](patch.md#x) ![b](../eval/results/2026-11-28-question/question.png) [c](../recipes) `[d](e)` [f](no.md)"
    new = repository.rewritten(text, "docs/index.md")
    assert new.startswith("[a](patch.md#x) ![b](repository/eval/results/2026-11-28-question/question.png)")
    assert "[c](repository/recipes/README.md)" in new and "[f](no.md)" in new
    back = repository.rewritten("[a](../../docs/faq.md) [b](../eafo/) [c](../kernels)", "crrelu_llm/export/README.md")
    assert back == "[a](../../../faq.md) [b](../eafo/README.md) c"
    assert repository.rewritten("```\n[c](../recipes)\n```", "docs/index.md") == "```\n[c](../recipes)\n```"


def test_the_front_page_is_short():
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words <= 900, f"README.md has {words} words; move some to docs/"


def test_every_page_is_in_the_menu_once():
    menu = [file for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for file in entry.values()]
    assert sorted(menu) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_command_is_documented():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in COMMANDS if f"crrelu {name}" not in text]
    assert not missing


def test_the_table_of_the_activation_section():
    from crrelu_llm.training.activation_section import ActivationArguments

    text = (ROOT / "docs/fine-tune.md").read_text(encoding="utf-8")
    section = text.partition("## The activation section")[2].partition("\n## ")[0]
    written = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.M))
    defaults = {entry.name: entry.default for entry in fields(ActivationArguments)}
    assert written.keys() == defaults.keys()
    for key, default in defaults.items():
        expected = "not set" if default is None else str(default).lower()
        assert written[key].strip("`") == expected, key


def test_what_the_reference_shows_exists():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name, options in re.findall(r"^::: ([\w.]+)\n((?:[ ].*\n)*)", text, re.M):
        members = re.search(r"members: \[(.+)\]", options)
        names = [f"{name}.{member}" for member in members[1].split(", ")] if members else [name]
        for whole in names:
            found(whole)


def found(name):
    """A module of that name, or what the module above it has."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == crrelu_llm.__version__


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_files_for_the_code_host(path):
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    for file in re.findall(r"\bconstraints[\w/]*\.txt", text):
        assert (ROOT / file).is_file(), file
    for extra in re.findall(r"\.\[([\w-]+)\]", text) + re.findall(r"extra: ([\w-]+)", text):
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_a_release_has_whole_links(tmp_path):
    """The package index shows the README without the files beside it."""
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    (step,) = [step for step in release["jobs"]["build"]["steps"] if "links" in step.get("name", "")]
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    names = {"GITHUB_REPOSITORY": "owner/name", "GITHUB_REF_NAME": "v9.9.9"}
    subprocess.run(["bash", "-euc", step["run"]], cwd=tmp_path, env=os.environ | names, check=True)
    links = re.findall(r"\]\(([^)]+)\)", (tmp_path / "README.md").read_text())
    assert links and all(link.startswith("https://") for link in links), links
    pictures = [link for link in links if link.endswith(".png")]
    assert pictures and all(link.startswith("https://github.com/owner/name/raw/v9.9.9/eval/") for link in pictures)
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == "https://github.com/owner/name" and urls["Issues"].endswith("name/issues")
