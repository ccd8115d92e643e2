"""What a GPU holds under each configuration: shares add up to the whole, and nothing grows where it must not."""

from dataclasses import replace

import pytest
from tiny import tiny_config

from crrelu_llm.planning.job import Job
from crrelu_llm.planning.model import prepared_config
from crrelu_llm.planning.spread import Steps, ddp, fsdp2, shares, single_gpu, zero2, zero3

JOB = Job(calibration="none", per_device_train_batch_size=2, max_length=32)
SHARDED = (fsdp2, zero3)
PARTS = ("weights", "gradients", "optimizer", "reference", "activations", "buffers")


def steps_of(job):
    return Steps(prepared_config(tiny_config("llama", hidden_size=64, intermediate_size=256), job), job)


@pytest.fixture(scope="module")
def full():
    return steps_of(JOB)


@pytest.fixture(scope="module")
def dpo():
    return steps_of(replace(JOB, trainer="dpo"))


@pytest.mark.parametrize("kind", SHARDED)
def test_shares_add_up_to_the_whole(kind, full):
    for part in ("weights", "gradients", "optimizer"):
        whole, shard = (getattr(kind(full, gpus), part) for gpus in (1, 8))
        assert whole <= shard * 8 < whole + 8  # rounded up to a byte


def test_only_what_a_configuration_shards_shrinks(full):
    one, eight = zero2(full, 1), zero2(full, 8)
    assert eight.weights == one.weights and eight.activations == one.activations
    assert eight.gradients * 8 < one.gradients + 8 and eight.optimizer * 8 < one.optimizer + 8


@pytest.mark.parametrize("kind", [fsdp2, zero2, zero3])
@pytest.mark.parametrize("which", ["full", "dpo"])
def test_more_gpus_never_hold_more_each(kind, which, request):
    steps = request.getfixturevalue(which)
    totals = [kind(steps, gpus).total for gpus in (1, 2, 8, 64, 512)]
    assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0]


def test_bytes_a_parameter(full):
    """Float32 weights, gradients and two moments are 16 bytes; ZeRO's bf16 ones with float32 masters are 16 too."""
    count = full.replicated().counts.total
    for row in (single_gpu(full), fsdp2(full, 1), zero2(full, 1), zero3(full, 1)):
        assert row.weights + row.gradients + row.optimizer == 16 * count
    assert ddp(full).buffers == ddp(full).gradients == 4 * count


def test_what_calibration_sets_is_whole_on_every_gpu(full):
    calibrated = steps_of(replace(JOB, calibration="fit"))
    for plain, row in zip(shares(full, 8, 8), shares(calibrated, 8, 8), strict=True):
        # layers x channels x the four x float32; a sharded number may be rounded up to a byte
        assert row.weights - plain.weights == pytest.approx(2 * 256 * 16, abs=1)
        assert (row.gradients, row.optimizer) == (plain.gradients, plain.optimizer)


def test_moments_follow_the_weights_unless_a_library_makes_masters():
    steps = steps_of(replace(JOB, dtype="bfloat16"))
    count = steps.replicated().counts
    assert single_gpu(steps).optimizer == 2 * (2 * (count.total - count.epsilon) + 4 * count.epsilon)
    assert fsdp2(steps, 1).optimizer == 8 * count.total
    assert zero3(steps, 1).optimizer == 12 * count.total


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_total_is_no_more_than_its_parts(accumulation, full):
    steps = steps_of(replace(JOB, gradient_accumulation_steps=accumulation))
    for row in shares(steps, 8, 8):
        parts = sum(getattr(row, part) for part in PARTS)
        assert row.moment == "update" or max(row.weights, row.activations) < row.total <= parts + 8
    # Gradients that stay from batch to batch can only add.
    assert all(more.total >= less.total for more, less in zip(shares(steps, 8, 8), shares(full, 8, 8), strict=True))


def test_dpo_holds_a_reference_unless_there_is_none(dpo):
    for row in shares(dpo, 8, 8):
        assert row.reference > 0
    for change in ({"use_peft": True}, {"precompute_ref_log_probs": True}):
        assert all(row.reference == 0 for row in shares(steps_of(replace(dpo.job, **change)), 8, 8))


def test_fsdp2_shards_dpos_reference_like_the_model(dpo):
    """No moment has the whole reference: with many GPUs a total is what it is without one."""
    alone = fsdp2(steps_of(replace(dpo.job, precompute_ref_log_probs=True)), 1 << 20)
    row = fsdp2(dpo, 1 << 20)
    assert row.reference < dpo.sharded().counts.total / 1000
    assert row.total == pytest.approx(alone.total, rel=1e-3)


def test_fewer_gradients_and_moments_with_adapters(full):
    lora = steps_of(replace(JOB, use_peft=True))
    for row, whole in zip(shares(lora, 8, 8), shares(full, 8, 8), strict=True):
        assert row.gradients < whole.gradients and row.optimizer < whole.optimizer and row.total < whole.total


def test_four_bits_are_less_than_a_third_of_sixteen_and_stay_whole():
    lora = steps_of(replace(JOB, use_peft=True, dtype="bfloat16"))
    qlora = steps_of(replace(lora.job, load_in_4bit=True))
    assert [row.config for row in shares(qlora, 8, 8)] == ["ddp"]
    count = qlora.replicated().counts
    saved = single_gpu(lora).weights - single_gpu(qlora).weights
    # Adapters are bf16 in QLoRA, float32 in LoRA.
    assert saved - 2 * count.adapters == pytest.approx((2 - 0.516) * count.quantised, rel=0.001)
    assert count.quantised == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256)  # every linear layer, not the head


def test_which_configurations_there_are(full):
    assert [row.config for row in shares(full, 1, 8)] == ["single_gpu"]
    assert [row.config for row in shares(full, 8, 8)] == ["ddp", "fsdp2", "zero2", "zero3"]
    assert [row.config for row in shares(full, 16, 8)] == ["ddp", "multi_node", "zero2", "zero3"]
