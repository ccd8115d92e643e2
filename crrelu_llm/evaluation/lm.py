"""lm-eval's language model around a loaded model: batches that fit the memory, log-probabilities in float32."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from lm_eval.models.huggingface import HFLM

from crrelu_llm.data.beginning import beginning

_BYTES_A_LOGIT = 12  # the logits, their log-softmax in float32, and an intermediate copy
_SHARE = 0.25  # of the free memory
_LARGEST = 64
_LARGEST_ON_CPU = 16  # larger batches are not faster on a CPU


class EvaluationLM(HFLM):
    """HFLM whose `auto` batches on a CPU are as large as the memory allows for their longest text.

    A GPU reports when its memory is full, and lm-eval then halves the batch; a process on a CPU is killed instead.
    """

    def __init__(self, *args: Any, longest: int | None = None, **kwargs: Any) -> None:
        self._longest = longest
        super().__init__(*args, **kwargs)
        self._beginning = beginning(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one that the tokenizer puts before texts, or lm-eval's."""
        before = getattr(self, "_beginning", None)
        return before[-1] if before else int(super().prefix_token_id)

    def tokens_of(self, text: str) -> int:
        """The number of tokens that the rolling log-likelihood of a text sums over."""
        return len(self.tok_encode(text, add_special_tokens=False))

    @property
    def max_length(self) -> int:
        """The context length of the model in tokens, or the shorter one that was set."""
        own = int(super().max_length)
        return own if self._longest is None else min(own, self._longest)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """lm-eval's method, with a progress bar unless TQDM_DISABLE is set."""
        return super().loglikelihood(requests, disable_tqdm or _without_bars())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """lm-eval's method if the tokenizer puts nothing before a text; with a bar unless TQDM_DISABLE is set.

        Otherwise the log-likelihood of the text's own tokens, in windows that each begin as the tokenizer begins a
        text. lm-eval encodes the text with a beginning-of-sequence token and puts another one before it, so it also
        scores the second after the first, and its later windows begin without the token.
        """
        if not self._beginning:
            return super().loglikelihood_rolling(requests, disable_tqdm or _without_bars())
        room = self.max_length + 1 - len(self._beginning)
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = [ids[start : start + room] for start in range(0, len(ids), room)]
            windows += [(None, list(self._beginning), window) for window in cut]
            owners += [index] * len(cut)
        total = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            total[owner] += float(score)
        return total

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """lm-eval's method, with a progress bar unless TQDM_DISABLE is set."""
        return super().generate_until(requests, disable_tqdm or _without_bars())

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
        # For rolling windows lm-eval shows a bar per batch, even with disable_tqdm.
        return super()._loglikelihood_tokens(requests, disable_tqdm or _without_bars(), **kwargs)

    def _batch_scheduler(self, pos: int, n_reordered_requests: Any) -> int:
        if self.device.type != "cpu":
            return super()._batch_scheduler(pos, n_reordered_requests)
        _, context, continuation = n_reordered_requests[pos]
        return self._fitting(len(context) + len(continuation))

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            return super()._detect_batch_size(requests, pos)
        return self._fitting(self.max_length)

    def _fitting(self, tokens: int) -> int:
        row = min(tokens, self.max_length) * self.vocab_size * _BYTES_A_LOGIT
        return max(1, min(_LARGEST_ON_CPU, int(_SHARE * psutil.virtual_memory().available // row)))

    def score(self, pairs: list[tuple[str, str]]) -> list[tuple[float, int, bool]]:
        """The log-probabilities of continuations.

        Args:
            pairs: A context and its continuation. If a pair is longer than the model's context length, the beginning
                of the context is cut; a continuation that is longer by itself loses its end.

        Returns:
            For each pair the log-probability of the continuation (nats), its number of tokens, and whether the pair
            was cut.
        """
        requests, cut = [], []
        for context, continuation in pairs:
            if context:
                before, after = self._encode_pair(context, continuation)
            else:
                before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            cut.append(len(before) + len(after) > self.max_length + 1)
            after = after[: self.max_length]
            before = before[-max(1, self.max_length + 1 - len(after)) :]
            requests.append(((context, continuation), before, after))
        scores = self._loglikelihood_tokens(requests)
        return [
            (float(score), len(request[2]), was_cut)
            for (score, _), request, was_cut in zip(scores, requests, cut, strict=True)
        ]


def _without_bars() -> bool:
    """Whether TQDM_DISABLE is set; lm-eval passes `disable` to each bar, which overrides the variable."""
    return os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false")


def build(
    model: Any, tokenizer: Any, batch_size: int | str, device: torch.device, max_length: int | None = None
) -> EvaluationLM:
    """The language model for lm-eval.

    Args:
        model: A causal LM in evaluation mode; it is moved to `device`.
        tokenizer: Its tokenizer.
        batch_size: The rows of a batch, or `"auto"`.
        device: The device to compute on.
        max_length: The longest context in tokens, if it is shorter than the model's own.
    """
    with quiet():
        return EvaluationLM(
            pretrained=model.to(device),
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=_LARGEST,
            softmax_dtype="float32",
            longest=max_length,
        )


class _Cuts(logging.Handler):
    """Counts the requests that lm-eval reports as truncated to the model's context length."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "runcating" in record.getMessage()


@contextlib.contextmanager
def quiet() -> Iterator[_Cuts]:
    """A context in which lm-eval prints to stderr and omits its hints about the call.

    Yields:
        The counter of truncated requests; its attribute `count` is their number.
    """
    logger, cuts = logging.getLogger("lm_eval"), _Cuts()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(cuts)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lm_eval")
            yield cuts
    finally:
        logger.removeHandler(cuts)
        logger.setLevel(level)
        logger.propagate = propagate
