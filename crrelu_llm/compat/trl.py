"""TRL: DPO's reference under FSDP2, the fused LM head, the divergence of distillation, the trainers' counters."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from crrelu_llm.compat import Private

_DPO = "trl.trainer.dpo_trainer"
_HEAD = "trl.kernels.chunked_logprob"
_TILES = ("_forward_tile", "_backward_tile", "_addmm_fp32")
_REFERENCES = {f"trl.trainer.{name}_trainer": f"{name.upper()}Trainer" for name in ("dpo", "kto", "grpo", "rloo")}
RELIES_ON = (
    *(
        Private(
            f"{module}:prepare_fsdp",
            "the reference would be whole on every GPU under FSDP2",
            takes=("model", "accelerator"),
            called_by=f"{module}:{trainer}.__init__",
        )
        for module, trainer in _REFERENCES.items()
    ),
    Private("trl.trainer.kto_trainer:KTOTrainer._compute_kl_logps", "the evaluation of KTO", takes=("model", "batch")),
    *(
        Private(f"{module}:{trainer}.{name}", "the evaluation of sampled answers")
        for module, trainer in _REFERENCES.items()
        if trainer in ("GRPOTrainer", "RLOOTrainer")
        for name in ("_generate", "_calculate_rewards", "_get_per_token_logps_and_entropies")
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
    """A context in which a reference model goes through `prepare(model, accelerator)` before TRL shards it."""
    modules: list[Any] = [importlib.import_module(name) for name in _REFERENCES]
    originals = [module.prepare_fsdp for module in modules]

    def prepared(original: Any) -> Callable[[Any, Any], Any]:
        return lambda model, accelerator: original(prepare(model, accelerator), accelerator)

    for module, original in zip(modules, originals, strict=True):
        module.prepare_fsdp = prepared(original)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.prepare_fsdp = original


@contextlib.contextmanager
def head_of_a_gpu() -> Iterator[None]:
    """A context in which TRL's fused LM head has its memory use on a GPU, where it computes one tile in place.

    Its plain version for CPUs copies the tile. For tensors without contents: nothing is computed.
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
