"""What a process of a launch finds out about it, and what it refuses; the launches themselves are in distributed/."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from tiny import tiny_model
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import crrelu_llm
from crrelu_llm.cli.main import main
from crrelu_llm.compat.transformers import loading_whole
from crrelu_llm.errors import InputError
from crrelu_llm.patching import loading
from crrelu_llm.training import launch, processes
from crrelu_llm.training.optimizer import epsilon_modules


def accelerator(kind="NO", mixed_precision="no", **state):
    """What an `Accelerator` says of a launch."""
    kind = DistributedType[kind]
    return SimpleNamespace(
        state=SimpleNamespace(distributed_type=kind, **state), num_processes=2, mixed_precision=mixed_precision
    )


def deepspeed(stage, **zero):
    """An `Accelerator` under DeepSpeed."""
    config = {"zero_optimization": zero}
    return accelerator("DEEPSPEED", deepspeed_plugin=SimpleNamespace(zero_stage=stage, deepspeed_config=config))


def fsdp(version=2, **plugin):
    """An `Accelerator` under FSDP."""
    return accelerator("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=version, **plugin))


def test_the_name_of_a_distribution():
    found = [accelerator(), accelerator("MULTI_GPU"), accelerator("MULTI_CPU"), fsdp(1), fsdp(2), deepspeed(3)]
    assert [*map(processes.distribution, found)] == ["none", "DDP", "DDP", "FSDP1", "FSDP2", "ZeRO-3"]
    assert processes.distribution(accelerator("XLA")) == "XLA"


def test_a_launch_of_fewer_processes_than_were_named_is_refused(monkeypatch):
    monkeypatch.setenv(launch.PROCESSES_ASKED, "2")
    processes.check_launch(accelerator("MULTI_CPU"))
    monkeypatch.setenv(launch.PROCESSES_ASKED, "4")
    with pytest.raises(InputError, match="asks for 4 processes, but Accelerate started 2: use a configuration"):
        processes.check_launch(accelerator("MULTI_CPU"))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_would_silently_be_ddp_is_refused(monkeypatch, name):
    processes.check_launch(accelerator("MULTI_CPU"))
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=f"the launch asks for {name}, .* would be DDP in 2 processes; use the ddp"):
        processes.check_launch(accelerator("MULTI_CPU"))


def test_zero3_must_save_a_model(monkeypatch):
    with pytest.raises(InputError, match="set zero3_save_16bit_model: true"):
        processes.check_launch(deepspeed(3))
    processes.check_launch(deepspeed(3, stage3_gather_16bit_weights_on_model_save=True))
    processes.check_launch(deepspeed(2))


def test_what_needs_whole_weights_is_refused_where_they_are_sharded():
    for whole in (accelerator(), accelerator("MULTI_GPU"), deepspeed(2)):
        processes.refuse_sharded_weights(whole, "distill_weight")
    for sharded in (fsdp(1), fsdp(2), deepspeed(3)):
        with pytest.raises(InputError, match=r"distill_weight needs whole weights, which (FSDP|ZeRO-3)"):
            processes.refuse_sharded_weights(sharded, "distill_weight")


def test_an_epsilon_of_another_dtype_is_a_unit_of_its_own():
    model = tiny_model("llama")
    crrelu_llm.patch(model, "crrelu", calibration="none")
    plugin = fsdp(mixed_precision_policy=None, transformer_cls_names_to_wrap=None)
    processes.prepare_fsdp2(plugin, model)
    assert plugin.state.fsdp_plugin.transformer_cls_names_to_wrap is None
    model.to(torch.bfloat16)
    for module in epsilon_modules(model).values():
        module.float()
    processes.prepare_fsdp2(plugin, model)
    assert set(plugin.state.fsdp_plugin.transformer_cls_names_to_wrap) == {"LlamaDecoderLayer", "CRReLU"}


def test_a_patch_loads_the_whole_model_whatever_the_launch_shards(monkeypatch, tiny_llama_checkpoint):
    from transformers.integrations import deepspeed as integration

    class Zero3:
        def is_zero3(self):
            return True

    config = Zero3()
    integration.set_hf_deepspeed_config(config)
    try:
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
        assert integration.is_deepspeed_zero3_enabled()
        with loading_whole():
            assert not integration.is_deepspeed_zero3_enabled()
            assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ
        assert integration.is_deepspeed_zero3_enabled()
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
        assert loading.skeleton(str(tiny_llama_checkpoint)).lm_head.weight.shape[0] > 0
    finally:
        integration.unset_hf_deepspeed_config()


def test_commands_that_are_not_distributed_run_on_the_first_process_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["patch", "builtin:nano", "--output_dir", str(tmp_path / "out"), "--calibration", "none"]) == 0
    assert main(["recipes", "list"]) == 0
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


def test_the_first_process_says_what_is_wrong_before_the_others(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("crrelu_llm.cli.main.time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["sft", "--config", "./absent.yaml"]) == 2
        assert capsys.readouterr().err.startswith("crrelu sft: no such recipe: ./absent.yaml")
    assert len(waited) == 1 and waited[0] > 5


@pytest.mark.parametrize(
    ("exitcode", "status", "said"),
    [(2, 2, ""), (1, 1, "exit status 1"), (-9, 1, "SIGKILL"), (130, 1, "exit status 130")],
)
def test_a_launch_ends_with_the_status_of_its_processes(monkeypatch, capsys, exitcode, status, said):
    import accelerate.commands.launch as accelerate_launch

    def fail(arguments):
        failure = ProcessFailure(local_rank=1, pid=7, exitcode=exitcode, error_file="none")
        raise ChildFailedError("crrelu_llm", {1: failure})

    monkeypatch.setattr(accelerate_launch, "launch_command", fail)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert launch.relaunch_if_asked(["sft"], ["--num_processes", "2"], {}, set()) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == (1 if said else 0)


def test_a_cpu_launch_of_several_processes_that_would_be_one_is_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match="accelerate launch --cpu runs one process"):
        launch.relaunch_if_asked(["sft"], ["--cpu", "--num_processes", "2"], {}, set())
