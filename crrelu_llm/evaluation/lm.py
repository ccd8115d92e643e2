"""lm-eval's language model over a loaded one: batches that fit the memory, log-probabilities in float32."""

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

_BYTES_A_LOGIT = 12  # the logits, their float32 log-softmax, and a copy of either on the way
_SHARE = 0.25  # of the free memory
_LARGEST = 64
_LARGEST_ON_CPU = 16  # more rows are no faster there


class EvaluationLM(HFLM):
    """HFLM whose `auto` batches on a CPU are as large as the memory allows for their longest text.

    A GPU says when its memory is full, and lm-eval then halves; a CPU's process is killed instead.
    """

    def __init__(self, *args: Any, longest: int | None = None, **kwargs: Any) -> None:
        self._longest = longest
        super().__init__(*args, **kwargs)
        self._beginning = beginning(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """What a text that nothing precedes is read after: what the tokenizer puts before texts, or else lm-eval's."""
        before = getattr(self, "_beginning", None)
        return before[-1] if before else int(super().prefix_token_id)

    def tokens_of(self, text: str) -> int:
        """How many tokens of a text its rolling log-likelihood is the sum of."""
        return len(self.tok_encode(text, add_special_tokens=False))

    @property
    def max_length(self) -> int:
        """The model's context in tokens, or the shorter one that was asked for."""
        own = int(super().max_length)
        return own if self._longest is None else min(own, self._longest)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As lm-eval's, its bar only where tqdm's are wanted."""
        return super().loglikelihood(requests, disable_tqdm or _without_bars())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As lm-eval's, where the tokenizer puts nothing before a text; its bar only where tqdm's are wanted.

        Else the log-likelihood of the text's tokens alone, in windows that each begin as the tokenizer begins a text.
        lm-eval encodes the text with the beginning-of-sequence token and puts one more before it, so that it also
        scores the one after the other; and its other windows begin without.
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
        """As lm-eval's, its bar only where tqdm's are wanted."""
        return super().generate_until(requests, disable_tqdm or _without_bars())

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
        # Of rolling windows lm-eval asks for a bar a batch, whatever it was told.
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
        """The log-probability of texts after others.

        Args:
            pairs: A context and what follows it. What is longer than the model's context loses the start of the
                context, and what is by itself longer loses its own end.

        Returns:
            For each pair the log-probability (nats), the number of tokens it is the sum of, and whether the pair was
            cut.
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
    """Whether tqdm's bars are switched off; lm-eval says so to each itself, which goes before the variable."""
    return os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false")


def build(
    model: Any, tokenizer: Any, batch_size: int | str, device: torch.device, max_length: int | None = None
) -> EvaluationLM:
    """The language model that lm-eval asks.

    Args:
        model: A causal LM in evaluation mode; it is moved to `device`.
        tokenizer: Its tokenizer.
        batch_size: Rows of a batch, or `"auto"`.
        device: Where to compute.
        max_length: The longest context in tokens, where the model's own is longer.
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
    """Counts the requests that lm-eval says it cut to the model's context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "runcating" in record.getMessage()


@contextlib.contextmanager
def quiet() -> Iterator[_Cuts]:
    """Within it, what lm-eval prints goes to stderr, and its hints about how it was called nowhere.

    Yields:
        What counts the requests that were cut, in `count`.
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
