"""lm-eval: its templates, and the methods of its language model that ours replaces."""

import contextlib
import functools
from collections.abc import Iterator

from crrelu_llm.compat import Private

_LM = "lm_eval.models.huggingface:HFLM"
RELIES_ON = (
    Private("lm_eval.utils:env", "reading rows would take minutes", called_by="lm_eval.utils:apply_template"),
    Private(f"{_LM}._loglikelihood_tokens", "progress bars, rolling windows", takes=("requests", "disable_tqdm")),
    Private(f"{_LM}._batch_scheduler", "batches that fit a CPU's memory", takes=("pos", "n_reordered_requests")),
    Private(f"{_LM}._detect_batch_size", "batches that fit a CPU's memory", takes=("requests", "pos")),
    Private(f"{_LM}.prefix_token_id", "the first token of a text"),
)


@contextlib.contextmanager
def compiling_once() -> Iterator[None]:
    """A context in which a template is compiled once; lm-eval compiles it for each row, which takes much longer."""
    from lm_eval import utils

    original = utils.env.from_string
    utils.env.from_string = functools.lru_cache(original)
    try:
        yield
    finally:
        utils.env.from_string = original
