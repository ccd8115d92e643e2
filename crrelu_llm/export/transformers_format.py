"""`--format transformers`: a checkpoint that loads without this package, checked in a process without it."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from crrelu_llm.errors import InputError
from crrelu_llm.export import check, runtimes
from crrelu_llm.patching import loading

# For each call reads a line of JSON, [begin, ids]; answers with a line, the size of the vocabulary, and float32s.
# None in sys.modules makes every import of the package fail, as if it were not installed.
_PROCESS = """
import json, sys
answers, sys.stdout = sys.stdout.buffer, sys.stderr
sys.modules["crrelu_llm"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto").eval()
for line in sys.stdin:
    begin, ids = json.loads(line)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), past_key_values=None if begin else cache, use_cache=True)
    cache = out.past_key_values
    answers.write(f"{out.logits.shape[-1]}\\n".encode() + out.logits.float().contiguous().numpy().tobytes())
    answers.flush()
"""


class Apart:
    """A checkpoint in a separate process, which cannot import this package."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-c", _PROCESS, str(directory), str(torch.get_num_threads())]
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said)
        self.begin()

    def begin(self) -> None:
        """Forgets the text."""
        self.begins = True

    def __call__(self, ids: Tensor) -> Tensor:
        """The logits of further tokens."""
        given, taken = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        try:
            given.write(json.dumps([self.begins, ids.tolist()]).encode() + b"\n")
            given.flush()
        except BrokenPipeError:
            self._failed()
        self.begins = False
        line = taken.readline()
        if not line:
            self._failed()
        vocabulary = int(line)
        data = bytearray(taken.read(4 * ids.numel() * vocabulary))
        return torch.frombuffer(data, dtype=torch.float32).view(*ids.shape, vocabulary)

    def _failed(self) -> None:
        self.process.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        raise InputError(
            f"the checkpoint does not load without crrelu_llm: {lines[-1] if lines else 'no reason given'}"
        )

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()
        self.said.close()


def write_and_check(
    loaded: Any, tokenizer: Any, scratch: Path, ids: Tensor, dtype: str, name: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Saves a patched model as a standalone checkpoint, and compares both.

    Args:
        loaded: The patched model.
        tokenizer: Its tokenizer, or None.
        scratch: Where to save; must be absent.
        ids: Tokens to compare, `(1, n)`.
        dtype: Name of the model's dtype.
        name: The name of the model, for messages.
        tell: Called with progress messages.

    Returns:
        The fields of the report.
    """
    from crrelu_llm.patching.standalone import write_standalone

    loading.save(loaded, tokenizer, scratch)
    write_standalone(scratch, name)
    tell("checking it in transformers, in a process without crrelu_llm")
    apart = Apart(scratch)
    try:
        result = check.compare(runtimes.Torch(loaded), apart, ids, dtype, name)
    finally:
        apart.close()
    return {"cache": True, "max_length": None, **result}
