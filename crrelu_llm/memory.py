"""Peak memory of one run: on an accelerator if there is one, else the process's resident memory."""

import threading
from typing import Self

import psutil
import torch

_INTERVAL = 0.05  # seconds between two samples of the resident memory


class PeakMemory:
    """Measures the peak memory inside a `with` block; `.bytes` is then the peak.

    On an accelerator the peak is the memory allocated by torch. On a CPU it is the process's resident set, sampled 20
    times a second, which includes the interpreter and the libraries.
    """

    bytes: int = 0

    def __enter__(self) -> Self:
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(_INTERVAL):
                return
