"""Several processes: their order, the distribution of a run, and sharded parameters."""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast, broadcast_object_list, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from crrelu_llm.activation import AffineModule
from crrelu_llm.errors import DiskError, InputError
from crrelu_llm.training.launch import PROCESSES_ASKED

_PATIENCE = datetime.timedelta(days=7)  # calibrating a large model takes longer than a collective's default half hour


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """A context that the main process runs first, for any length of time, so that the others find its files.

    Then one process of each other host runs it, in case the hosts do not share a disk, and then the rest. An error in
    one process is raised in all.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    # gloo, not the training's backend: waiting does not occupy a GPU, and may take longer than a training step.
    group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    try:
        for _ in range(turn):
            _exchange(group, None)
        try:
            yield
        except Exception as error:
            with contextlib.suppress(type(error)):
                _exchange(group, error)
            raise
        for _ in range(3 - turn):
            _exchange(group, None)
    finally:  # its thread must not be running when a process ends
        torch.distributed.destroy_process_group(group)


def _exchange(group: Any, error: Exception | None) -> None:
    """Waits for all processes; raises the error of any of them, with its message."""
    kinds = {kind.__name__: kind for kind in (InputError, DiskError)}
    brought: list[Any] = [None] * torch.distributed.get_world_size()
    mine = None if error is None else (type(error).__name__, str(error))
    torch.distributed.all_gather_object(brought, mine, group)
    for found in filter(None, brought):
        kind, message = found
        raise kinds[kind](message) if kind in kinds else RuntimeError(f"another process failed: {kind}: {message}")


def all_agree(value: Any, otherwise: str) -> Any:
    """Returns `value` if it is the same in every process.

    Raises:
        InputError: The values differ, as they may on hosts without a shared disk; the message is `otherwise`.
    """
    if any(other != value for other in gather_object([value])):
        raise InputError(otherwise)
    return value


def from_main(value: Any) -> Any:
    """The main process's value, in every process; without it, hosts without a shared disk might diverge."""
    return broadcast_object_list([value])[0]


def distribution(accelerator: Accelerator) -> str:
    """How training is distributed: `none`, `DDP`, `FSDP1`, `FSDP2`, `ZeRO-1` to `ZeRO-3`, or Accelerate's own name."""
    state = accelerator.state
    if state.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{state.deepspeed_plugin.zero_stage}"
    if state.distributed_type == DistributedType.FSDP:
        return f"FSDP{state.fsdp_plugin.fsdp_version}"
    if state.distributed_type == DistributedType.NO:
        return "none"
    name = state.distributed_type.value
    return "DDP" if name.startswith("MULTI_") else name


def check_launch(accelerator: Accelerator) -> None:
    """Raises InputError if Accelerate silently ignores the configuration: fewer processes, or no sharding."""
    processes = os.environ.get(PROCESSES_ASKED)
    if processes and int(processes) != accelerator.num_processes:
        raise InputError(
            f"the launch asks for {processes} processes, but Accelerate started {accelerator.num_processes}: use a "
            "configuration that starts several, such as --accelerate_config ddp"
        )
    for name in ("FSDP", "DEEPSPEED"):
        asked = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        if asked and accelerator.state.distributed_type != DistributedType[name]:
            raise InputError(
                f"the launch asks for {name}, which Accelerate does not run on this device: training would be "
                f"{distribution(accelerator)} in {accelerator.num_processes} processes; use the ddp configuration"
            )
    if distribution(accelerator) == "ZeRO-3":
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise InputError(
                "ZeRO-3 would not save a loadable model: set zero3_save_16bit_model: true in the launch's "
                "configuration (stage3_gather_16bit_weights_on_model_save in a DeepSpeed file)"
            )


def refuse_sharded_weights(accelerator: Accelerator, what: str) -> None:
    """Raises InputError if weights are sharded, for an option `what` that reads them outside a forward pass."""
    found = distribution(accelerator)
    if found.startswith("FSDP") or found == "ZeRO-3":
        raise InputError(
            f"{what} needs whole weights, which {found} does not give; use the ddp or zero2 configuration"
        )


def refuse_16_bit_zero3(accelerator: Accelerator, model: nn.Module) -> None:
    """Raises InputError if ZeRO-3 would train scale, shift, gain and offset beside 16-bit weights.

    ZeRO-3 needs one dtype for all parameters, and rounding the four would change the calibration.
    """
    narrow = any(parameter.dtype.itemsize < 4 for parameter in model.parameters())
    if distribution(accelerator) == "ZeRO-3" and (narrow or accelerator.mixed_precision != "no"):
        raise InputError(
            "affine_learning_rate trains float32 numbers, which ZeRO-3 cannot do beside 16-bit weights; use the ddp "
            "or fsdp2 configuration, or leave affine_learning_rate out"
        )


def prepare_fsdp2(accelerator: Accelerator, model: Any) -> None:
    """Configures FSDP2 for a model before Accelerate or TRL shards it; has no effect without FSDP2.

    Outputs keep the dtype of the computation: Accelerate would round them to the dtype of mixed precision, which
    turned a DPO loss of ln 2 into 0.6914. An activation with parameters of another dtype than the layer around it
    becomes a separate unit.
    """
    if distribution(accelerator) != "FSDP2":
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
    quantised = any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())
    if accelerator.mixed_precision != "no" and not quantised:
        return  # Accelerate makes all trained parameters float32
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    ours = {type(module).__name__ for module in _affine_modules(model) if next(module.parameters(), None) is not None}
    if len(dtypes) > 1 and ours:
        names = plugin.transformer_cls_names_to_wrap or model._no_split_modules
        plugin.transformer_cls_names_to_wrap = list({*names, *ours})


def shard_fsdp2(accelerator: Accelerator, model: Any) -> Any:
    """Accelerate's `fsdp2_prepare_model`, for models whose activations have buffers; every process must call it.

    `fsdp2_prepare_model` treats everything in a state dict as sharded parameters. It keeps buffers outside the state
    dict, but separately in each process, and only the main process of a host may have read the checkpoint.
    """
    modules = [inner for module in _affine_modules(model) for inner in module.modules()]
    hidden: dict[nn.Module, set[str]] = {}  # buffers of the state dict that are temporarily left out of it
    for module in modules:
        buffers = dict(module.named_buffers(recurse=False))
        for name, value in buffers.items():
            setattr(module, name, broadcast(value.to(accelerator.device)))
        hidden[module] = buffers.keys() - module._non_persistent_buffers_set
        module._non_persistent_buffers_set.update(hidden[module])
    try:
        return fsdp2_prepare_model(accelerator, model)
    finally:
        for module, names in hidden.items():
            module._non_persistent_buffers_set.difference_update(names)


def _affine_modules(model: Any) -> list[AffineModule]:
    return [module for module in model.modules() if isinstance(module, AffineModule)]


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """A context in which ZeRO-3's parameters are whole; others do not change. Every process must enter it."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def whole_values(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The whole values of sharded or plain parameters, float32, on the CPU. Every process must call this function.

    Under DeepSpeed the values come from the optimiser's float32 copy, because the model's may be rounded.
    """
    values = {}
    for name, parameter in parameters.items():
        value = _master_copy(parameter)
        with gathered([parameter] if value is None else []):
            value = parameter if value is None else value
            if hasattr(value, "full_tensor"):  # FSDP2
                value = value.full_tensor()
            values[name] = value.detach().float().cpu().clone()
    return values


def _master_copy(parameter: nn.Parameter) -> Tensor | None:
    if not parameter.requires_grad or not (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")):
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)
