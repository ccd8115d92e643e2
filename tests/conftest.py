"""Settings and fixtures that all tests share: no network, one thread, tiny checkpoints with a tokenizer."""

import gc
import json
import os
from pathlib import Path

# torch and transformers are imported where they are needed: the first process of pytest-xdist, which runs no test,
# reads this file before it starts the others.
from device import has_gpu

# Triton kernels run on a CPU in its interpreter only, which they, and Triton's own functions, ask for where they are
# imported: builds of torch for CUDA import them by themselves.
os.environ |= {} if has_gpu() else {"TRITON_INTERPRET": "1"}
# Before torch and transformers are imported, and inherited by the processes that tests start.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only slow tiny models down

import pydoc_data.topics

import pytest
from hypothesis import settings

# A loaded machine is no failure, and the same examples every time.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# What `-m quick` runs, and all that it reads: files of less than a few seconds, one or more of every room.
_QUICK = {
    *("test_activation.py", "test_rooms.py"),
    *(f"cli/test_{name}.py" for name in ("main", "env_cli", "recipes_cli")),
    *(f"comparison/test_{name}.py" for name in ("arms", "results")),
    *(f"data/test_{name}.py" for name in ("pairs", "beginning")),
    *(f"eafo/test_{name}.py" for name in ("activations", "density", "entropy", "wafbc")),
    *(f"evaluation/test_{name}.py" for name in ("contrast", "eval_results", "metrics", "rows")),
    *(f"patching/test_{name}.py" for name in ("activation_names", "config", "guard", "section", "sites", "mixture")),
    *(f"report/test_{name}.py" for name in ("headline", "report")),
    *(f"statistics/test_{name}.py" for name in ("intervals",)),
    *(f"training/test_{name}.py" for name in ("arguments", "optimizer", "processes", "prepare")),
}

TEXT = "\n\n".join(pydoc_data.topics.topics.values())[:50_000]
_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with about 400 tokens, pad and end of sequence among them, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=_CHAT,
        model_max_length=128,
    )


def _checkpoint(family, tokenizer, directory, **sizes):
    """Saves a tiny model that has learnt a little English, so that a swap makes its perplexity worse."""
    import torch
    from tiny import tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=len(tokenizer), **sizes)).train()
    ids = torch.tensor(tokenizer(TEXT, verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        starts = torch.randint(0, len(ids) - 64, (8,), generator=generator)
        batch = torch.stack([ids[start : start + 64] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer):
    """What saves a tiny model of a family, with its tokenizer: `(family, directory, **sizes)`."""
    return lambda family, directory, **sizes: _checkpoint(family, tokenizer, directory, **sizes)


@pytest.fixture(scope="session")
def tiny_checkpoint(tokenizer, tmp_path_factory):
    """Directory of a tiny GPT-2 (2 layers, width 128, 128 positions) with its tokenizer."""
    return _checkpoint("gpt2", tokenizer, tmp_path_factory.mktemp("checkpoint") / "gpt2")


@pytest.fixture(scope="session")
def tiny_llama_checkpoint(tokenizer, tmp_path_factory):
    """Directory of a tiny Llama (2 layers, width 48, 128 positions) with its tokenizer."""
    return _checkpoint("llama", tokenizer, tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A plain text file of 50 000 characters of English, for calibration and perplexity."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def sketched(monkeypatch):
    """Figures are drawn, and not turned into SVG, which takes most of a report's time."""
    from crrelu_llm.report import differences, plots

    for module in (plots, differences):
        monkeypatch.setattr(module, "inline_svg", lambda figure, name: "<svg></svg>")


@pytest.fixture(scope="session", autouse=True)
def no_power_failure():
    """What tests write need not survive one: files are not forced onto the disk."""
    os.fsync = lambda number: None


def _is_quick(path):
    return path.relative_to(Path(__file__).parent).as_posix() in _QUICK


def pytest_ignore_collect(collection_path, config):
    """With `-m quick` nothing else is read."""
    if config.option.markexpr == "quick" and collection_path.name.startswith("test_") and collection_path.is_file():
        return True if not _is_quick(collection_path) else None
    return None


def pytest_itemcollected(item):
    """Marks the quick tests."""
    if _is_quick(item.path) and not item.get_closest_marker("slow"):
        item.add_marker("quick")


_frozen_for = []


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item):
    """Skips a test that needs a library of an extra where it is not installed, and freezes what was imported.

    Every Trainer collects garbage when it starts, 0.6 s over all that the imports have made: that is never any. Once
    more for every file, because much is imported late.
    """
    for mark in item.iter_markers("needs"):
        for library in mark.args:
            pytest.importorskip(library, reason=f"{library} is an extra")
    if item.path not in _frozen_for:
        _frozen_for[:] = [item.path]
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="module")
def nothing_frozen():
    """For files that measure memory again and again, which counts what is frozen: 0.1 s each time."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config, log):
    """Neighbouring tests in one process, which then makes what they share once: fixtures, imports, compiled loops.

    The default deals tests out one by one. Whoever has nothing left takes half of what another still has to do.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_terminal_summary(terminalreporter):
    """Names the families of transformers that no tiny model could be built of, where their tests ran."""
    reports = terminalreporter.stats.get("passed", [])
    if any("test_families.py::test_not_built" in report.nodeid for report in reports):
        facts = json.loads((Path(__file__).parent / "patching" / "families.json").read_text())
        for family, entry in facts.items():
            if "not_built" in entry:
                terminalreporter.write_line(f"family not built, so not tested: {family} ({entry['not_built']})")
