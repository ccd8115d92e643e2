"""Kills real commands with SIGKILL: at a chosen write, half-way through a file, or at any moment from outside.

Children are forked from a server that has imported everything, so that a start costs a fork and not ten seconds of
imports. What a child runs is `crrelu_llm.cli.main.main`, the command line's own entry.
"""

import builtins
import contextlib
import io
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

PHASES = ["start-up", "patching", "calibrating", "building", "step", "saving a checkpoint", "final save", "report"]


class Children:
    """Starts commands as forked children, and kills them.

    Args:
        folder: For their output and the byte that says what they are doing.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        here = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [here, str(Path(here).parents[1]), os.environ.get("PYTHONPATH", "")]
        )
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["crash_imports"])

    def run(self, argv, kill_at=0, kill_after=None, limit=0):
        """Exit status (-9: killed), the phase it ended in, the number of writes begun, and what stderr holds.

        Args:
            argv: The command line, without `crrelu`.
            kill_at: The child kills itself at this write; 0: never.
            kill_after: Seconds after which it is killed from outside; None: never.
            limit: The greatest size of a file, in bytes; 0: none.
        """
        phase, log = self.folder / "phase", self.folder / "log"
        phase.write_bytes(bytes(16))
        child = self.context.Process(target=_child, args=([str(a) for a in argv], kill_at, limit, str(self.folder)))
        child.start()
        child.join(kill_after)
        if child.is_alive():
            child.kill()
            child.join()
        state = phase.read_bytes()
        return child.exitcode, PHASES[state[0]], int.from_bytes(state[8:16], "little"), log.read_text(errors="replace")


def _child(argv, kill_at, limit, folder):
    with open(f"{folder}/phase", "r+b") as file:
        state = mmap.mmap(file.fileno(), 16)
    number = os.open(f"{folder}/log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(number, 1)
    os.dup2(number, 2)
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    _watch_phases(state)
    _Writes(kill_at, state).install()
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from crrelu_llm.cli.main import main

    status = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch_phases(state):
    """Makes the functions that begin a phase say so."""
    from crrelu_llm import report
    from crrelu_llm.patching import calibration, loading, transform
    from crrelu_llm.training import prepare, run, saving
    from crrelu_llm.training.kinds import all_kinds

    def marked(owner, name, phase):
        original = getattr(owner, name)

        def begins(*args, **kwargs):
            before, state[0] = state[0], PHASES.index(phase)
            try:
                return original(*args, **kwargs)
            finally:
                state[0] = before

        setattr(owner, name, begins)

    marked(prepare, "patch_checkpoint", "patching")
    marked(transform.loading, "load_model", "patching")
    marked(calibration, "calibrate", "calibrating")
    marked(loading, "save", "patching")
    for kind in all_kinds():
        marked(kind.trainer, "__init__", "building")
    marked(saving.SavingMixin, "_run_epoch", "step")
    marked(saving.SavingMixin, "_save_checkpoint", "saving a checkpoint")
    marked(run, "save_final_model", "final save")
    marked(run, "write_json", "final save")
    marked(report, "write_report", "report")


class _Writes:
    """Counts what a command writes: files opened, written half and whole, renamed, deleted. Kills at one of them."""

    def __init__(self, kill_at, state):
        self.kill_at, self.count, self.state, self.inside = kill_at, 0, state, False

    def at(self):
        """One more; the process may end here."""
        self.count += 1
        self.state[8:16] = self.count.to_bytes(8, "little")
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self):
        """Puts itself around everything that writes."""
        import peft.peft_model
        import safetensors.torch
        import torch
        import transformers.modeling_utils

        import crrelu_llm.patching.calibration.finished_layers as finished_layers

        torch.save = self.halves(torch.save, lambda args, kwargs: args[1])
        save_file = self.halves(safetensors.torch.save_file, lambda args, kwargs: args[1])
        safetensors.torch.save_file = save_file
        transformers.modeling_utils.safe_save_file = save_file
        peft.peft_model.safe_save_file = save_file
        finished_layers.save_file = save_file
        for name in ("replace", "rename"):
            setattr(os, name, self.around(getattr(os, name)))
        shutil.rmtree = self.delete_one_then(shutil.rmtree)
        builtins.open = io.open = self.opened(io.open)

    def halves(self, write, path_of):
        def written(*args, **kwargs):
            if self.inside:
                return write(*args, **kwargs)
            self.inside = True
            result = write(*args, **kwargs)
            self.inside = False
            path = path_of(args, kwargs)
            if self.count + 1 == self.kill_at and isinstance(path, str | os.PathLike):
                os.truncate(path, os.path.getsize(path) // 2)
            self.at()  # half of it is there
            self.at()  # all of it
            return result

        return written

    def around(self, act):
        def acted(*args, **kwargs):
            self.at()
            result = act(*args, **kwargs)
            self.at()
            return result

        return acted

    def delete_one_then(self, delete):
        def deleted(path, *args, **kwargs):
            files = [entry for entry in Path(path).rglob("*") if entry.is_file()] if os.path.isdir(path) else []
            if files:
                with contextlib.suppress(OSError):
                    files[0].unlink()
                self.at()
            return delete(path, *args, **kwargs)

        return deleted

    def opened(self, opens):
        def opened(file, mode="r", *args, **kwargs):
            result = opens(file, mode, *args, **kwargs)
            writes = set(mode) & set("wxa+") and isinstance(file, str | os.PathLike)
            if writes and not self.inside and not str(file).startswith("/dev"):
                self.at()  # it is empty now
            return result

        return opened


def bits(value):
    """JSON-like content, with every number as its exact text."""
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [bits(entry) for entry in value]
    return value.hex() if isinstance(value, float) else value
