"""What we rely on in other libraries: each part is there, takes what we give it, and is called where we replace it."""

import ast
import importlib
from pathlib import Path

import pytest

import crrelu_llm
from crrelu_llm import compat

PACKAGE = Path(crrelu_llm.__file__).parent


@pytest.mark.parametrize("library", compat.LIBRARIES)
def test_the_installed_release_has_all_that_we_rely_on(library):
    pytest.importorskip(library, reason=f"{library} is an extra")
    assert compat.problems((library,)) == []


def test_what_is_gone_is_said_with_what_breaks():
    gone = compat.Private("torch:no_such_thing", "the kernels")
    assert gone.problem().startswith("torch:no_such_thing is gone") and gone.problem().endswith("the kernels")
    assert compat.Private("no_such_library_:x", "y", optional=True).problem() is None
    other = compat.Private("textwrap:dedent", "the help", takes=("text", "margin"))
    assert other.problem() == "textwrap:dedent takes no margin: the help"
    elsewhere = compat.Private("textwrap:dedent", "the help", called_by="textwrap:shorten")
    assert elsewhere.problem() == "textwrap:shorten does not call textwrap:dedent: the help"


def test_private_modules_and_names_are_imported_in_compat_alone():
    found = []
    for path in PACKAGE.rglob("*.py"):
        if "compat" in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            else:
                continue
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            if private and names[0] in compat.LIBRARIES:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {'.'.join(names)}")
    assert found == ["bench/op.py:7: torch._functorch.config"]  # a module of options, which torch documents


def test_every_library_has_its_file_and_its_list():
    for library in compat.LIBRARIES:
        parts = importlib.import_module(f"crrelu_llm.compat.{library}").RELIES_ON
        assert parts and all(part.breaks for part in parts)


class TestReplaced:
    """What a contextmanager replaces is put back, also after an error, and is what the library then calls."""

    @pytest.mark.parametrize(
        ("manager", "arguments", "module", "name"),
        [
            (
                "trl:preparing_references",
                (lambda model, accelerator: model,),
                "trl.trainer.dpo_trainer",
                "prepare_fsdp",
            ),
            ("trl:head_of_a_gpu", (), "trl.kernels.chunked_logprob", "_forward_tile"),
            (
                "accelerate:sharding",
                (lambda accelerator, model: model,),
                "accelerate.accelerator",
                "fsdp2_prepare_model",
            ),
            ("bitsandbytes:trainable_layers", (), "bitsandbytes.nn.modules", "has_avx512bf16"),
        ],
    )
    def test_within_and_afterwards(self, manager, arguments, module, name):
        library, _, function = manager.partition(":")
        pytest.importorskip(library, reason=f"{library} is an extra")
        replace = getattr(importlib.import_module(f"crrelu_llm.compat.{library}"), function)
        module = importlib.import_module(module)
        original = getattr(module, name)
        with pytest.raises(RuntimeError), replace(*arguments):
            assert getattr(module, name) is not original
            raise RuntimeError
        assert getattr(module, name) is original
