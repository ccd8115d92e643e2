"""TRL: DPO's reference under FSDP2, the fused LM head, the divergence of distillation, what trainers count."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from crrelu_llm.compat import Private

_DPO = "trl.trainer.dpo_trainer"
_HEAD = "trl.kernels.chunked_logprob"
_TILES = ("_forward_tile", "_backward_tile", "_addmm_fp32")
RELIES_ON = (
    Private(
        f"{_DPO}:prepare_fsdp",
        "DPO's reference would be whole on every GPU under FSDP2",
        takes=("model", "accelerator"),
        called_by=f"{_DPO}:DPOTrainer.__init__",
    ),
    Private(f"{_DPO}:DPOTrainer.compute_ref_log_probs", "the reference of a blend", takes=("model", "inputs")),
    Private(f"{_DPO}:DPOTrainer._precompute_ref_logps", "cached reference log-probabilities of another activation"),
    Private("trl.trainer.utils:create_model_from_path", "distillation: the teacher"),
    Private("trl.trainer.utils:add_fused_lm_head", "crrelu plan"),
    Private("trl.trainer.utils:disable_dropout_in_model", "crrelu plan"),
    Private(
        "trl.trainer.distillation_trainer:_chunked_divergence_loss",
        "distillation",
        takes=("num_items_in_batch", "student_lm_head_bias", "teacher_logit_scale", "student_final_logit_softcapping"),
    ),
    *(Private(f"{_HEAD}:{name}", "crrelu plan for a GPU") for name in _TILES),
    Private("trl.data_utils:is_conversational_from_value", "rows of messages in evaluation"),
    Private("trl.data_utils:maybe_convert_to_chatml", "rows of messages in evaluation"),
    Private("trl.data_utils:extract_prompt", "preference pairs with an implicit prompt"),
)


@contextlib.contextmanager
def preparing_references(prepare: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Within it, DPO's reference model goes through `prepare(model, accelerator)` before TRL shards it."""
    from trl.trainer import dpo_trainer

    original = dpo_trainer.prepare_fsdp
    dpo_trainer.prepare_fsdp = lambda model, accelerator: original(prepare(model, accelerator), accelerator)
    try:
        yield
    finally:
        dpo_trainer.prepare_fsdp = original


@contextlib.contextmanager
def head_of_a_gpu() -> Iterator[None]:
    """Within it, TRL's fused LM head holds what it holds on a GPU, where it computes in one tile, in place.

    Its plain version for CPUs makes copies of the tile. Nothing is computed: for tensors without contents.
    """
    from trl.kernels import chunked_logprob as head

    originals = {name: getattr(head, name) for name in _TILES}
    try:
        for name in _TILES:
            setattr(head, name, lambda *args, **kwargs: None)
        yield
    finally:
        for name, original in originals.items():
            setattr(head, name, original)


def chunked_divergence(*args: Any, **kwargs: Any) -> Any:
    """TRL's divergence of two models' next-token distributions from their hidden states, tile by tile."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss(*args, **kwargs)
