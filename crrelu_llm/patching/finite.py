"""Runs a model only to inspect it: in evaluation mode, and with a check that its outputs are not NaN."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from crrelu_llm.errors import InputError
from crrelu_llm.patching.feeding import run_on

logger = logging.getLogger("crrelu_llm")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in evaluation mode, after which each module returns to its previous mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def require_finite(model: nn.Module, input_ids: Tensor, outcome: str = "nothing has been written") -> None:
    """Runs a model on a few tokens or an image and names the innermost module whose output is NaN.

    A model that needs more inputs than token ids or pixels is not checked.

    Args:
        model: A causal LM, or an image classifier.
        input_ids: `(batch, tokens)`, int64; or pixels, see `run_on`.
        outcome: The consequence for the caller's work, for the message.

    Raises:
        InputError: A module's output is NaN.
    """
    names = {module: name for name, module in model.named_modules()}
    hooks = [module.register_forward_hook(lambda m, _, output: _check(names[m], output, outcome)) for module in names]
    try:
        with evaluating(model), torch.no_grad():
            run_on(model, input_ids.to(next(model.parameters()).device))
    except InputError:
        raise
    except Exception as error:
        logger.debug("the model's numbers are not checked: it does not run on this input alone: %s", error)
    finally:
        for hook in hooks:
            hook.remove()


def _check(name: str, output: Any, outcome: str) -> None:
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor) and first.is_floating_point() and first.isnan().any():
        raise InputError(
            f"{name}: its output on ordinary input is not a number: the checkpoint is broken there or needs a wider "
            f"dtype; {outcome}"
        )
