"""Finds the checkpoint from which a run resumes, the newest whole one, and says what is wrong with a damaged one."""

import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open

from crrelu_llm.errors import InputError
from crrelu_llm.files import remove
from crrelu_llm.training.processes import all_agree, main_process_first

logger = logging.getLogger("crrelu_llm")
STATE = "trainer_state.json"
FILES = "checkpoint_files.json"  # the files of a whole checkpoint: the size of each, by name
ASIDE = ".old.tmp"
# Leftovers of killed writers in an output directory; nothing else is ever removed there.
_LEFTOVERS = (".checkpoint-*.tmp", ".saving.tmp", ".model.tmp", ".trial.*.tmp", ".patched.*.tmp", ".run.json.*.tmp")
_PARTS = ("optimizer*", "scheduler.pt", "rng_state*.pth")


def checkpoint_to_resume(wanted: Any, output_dir: Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names, checked.

    Args:
        wanted: A path; `true`: the newest checkpoint of `output_dir`; `auto`: the newest whole one, or None if there
            is none; `false` or nothing: None.
        output_dir: The run's directory.

    Raises:
        InputError: The checkpoint is missing or damaged; the message names the newest whole one.
    """
    with main_process_first():
        if PartialState().is_main_process:
            tidy(output_dir)
    word = str(wanted or "false").lower()
    if word == "false":
        return None
    if word == "auto":
        newest = all_agree(
            last_checkpoint(output_dir),
            f"resume_from_checkpoint: the hosts do not see the same checkpoints in {output_dir}: resuming needs a "
            "disk that they share, or save_on_each_node: true",
        )
        if newest is not None:
            _warn_without_optimizer(Path(newest))
        return newest
    if word == "true":
        begun = [path for path in checkpoints(output_dir) if (path / STATE).is_file()]
        if not begun:
            raise InputError(
                f"resume_from_checkpoint: {output_dir} has no checkpoint to resume from; leave it out, or set it to "
                "auto, which starts from the beginning if there is none"
            )
        found = begun[0]
    else:
        found = Path(wanted)
    fault = fault_of(found)
    if fault is None:
        _warn_without_optimizer(found)
        return str(found)
    place = found.parent if checkpoints(found.parent) else output_dir  # it may be another run's
    whole = last_checkpoint(place, warn=False)
    instead = f"resume from {whole} instead" if whole else f"{place} has no whole one; start without it"
    named = found if word == "true" else wanted
    raise InputError(f"resume_from_checkpoint: {named} is not a whole checkpoint ({fault}); {instead}")


def _warn_without_optimizer(checkpoint: Path) -> None:
    states = ("optimizer*", "latest", "pytorch_model_fsdp*", "global_step*")
    if not any(any(checkpoint.glob(state)) for state in states) and PartialState().is_main_process:
        logger.warning(
            "%s was saved with save_only_model: the optimiser and the learning-rate schedule start again", checkpoint
        )


def checkpoints(output_dir: Path) -> list[Path]:
    """The directories `checkpoint-N`, whole or not, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(filter(Path.is_dir, found), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """N of `checkpoint-N`."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(output_dir: Path, warn: bool = True) -> str | None:
    """The newest whole `checkpoint-N` of a run, or None.

    Args:
        output_dir: The run's directory.
        warn: Whether to log which newer checkpoints are skipped, and why.
    """
    for path in checkpoints(output_dir):
        fault = fault_of(path)
        if fault is None:
            return str(path)
        if warn and PartialState().is_main_process:
            logger.warning("%s is not a whole checkpoint (%s): it is skipped", path, fault)
    return None


def fault_of(checkpoint: Path) -> str | None:
    """What is missing or truncated in a checkpoint, or None if a run can resume from it.

    Our checkpoints list their files; a checkpoint of another program is checked part by part.
    """
    if not checkpoint.is_dir():
        return "no such directory"
    if not (checkpoint / STATE).is_file():
        return f"no {STATE}"
    try:
        json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"]
    except (ValueError, TypeError, KeyError):
        return f"{STATE} is damaged"
    return _listed(checkpoint) or _lacking(checkpoint) or _cut_off(checkpoint)


def _listed(checkpoint: Path) -> str | None:
    if not (checkpoint / FILES).is_file():
        return None
    try:
        sizes = dict(json.loads((checkpoint / FILES).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return f"{FILES} is damaged"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def _lacking(checkpoint: Path) -> str | None:
    if (checkpoint / FILES).is_file() or (checkpoint / "latest").is_file():  # DeepSpeed has its own files
        return None
    there = {part: any(checkpoint.glob(part)) for part in _PARTS}
    lacking = [part.replace("*", "") for part, found in there.items() if not found]
    return f"no {lacking[0]}" if lacking and any(there.values()) else None


def _cut_off(checkpoint: Path) -> str | None:
    """The first file that is shorter or longer than its own index says; the tensors are not read."""
    for file in sorted(checkpoint.rglob("*")):
        name = file.relative_to(checkpoint)
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError):
                return f"{name} is cut off or damaged"
        elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
            return f"{name} is cut off or damaged"
    return None


def tidy(output_dir: Path) -> None:
    """Removes the leftovers of killed writers; a checkpoint that was moved aside for another gets its name back."""
    for aside in output_dir.glob(f".checkpoint-*{ASIDE}"):
        target = aside.with_name(aside.name.removeprefix(".").removesuffix(ASIDE))
        if not target.exists():
            os.replace(aside, target)
    for pattern in _LEFTOVERS:
        for path in output_dir.glob(pattern):
            remove(path)


def how_to_go_on(output_dir: Path) -> str:
    """The part of a stopped run that is safe, and how to resume."""
    found = last_checkpoint(output_dir, warn=False)
    if found:
        return f"{found} is safe; add --resume_from_checkpoint {found} to go on"
    return "no checkpoint had been saved yet; run the same command again to start over"
