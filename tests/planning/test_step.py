"""A step that is played through on fake tensors against the real one: the same code must hold the same memory."""

from dataclasses import replace

import pytest
import torch
import transformers
from families import IS_RELEASE, family_config
from runs import LORA, Workshop
from tiny import tiny_config

from crrelu_llm.assets import nano_path
from crrelu_llm.bench.allocations import peak_memory
from crrelu_llm.errors import InputError
from crrelu_llm.planning.job import Job, load_config
from crrelu_llm.planning.model import prepared_config
from crrelu_llm.planning.spread import Steps, single_gpu
from crrelu_llm.planning.step import play

CPU = Job(use_cpu=True, bf16=False, per_device_train_batch_size=2, max_length=32, gradient_checkpointing=False)
CALIBRATED = {"calibration": "fit", "calibration_tokens": 256}
GPU = Job(per_device_train_batch_size=2, max_length=32, gradient_checkpointing=False)


def step(config, job, dtype=torch.float32):
    return play(prepared_config(config, job), job, dtype, job.bf16)


def wide_llama(**sizes):
    return tiny_config("llama", **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6} | sizes)


@pytest.fixture(scope="module")
def llama():
    return wide_llama()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {"recompute_activation": True}),
        ("sft", {"bf16": True, "gradient_checkpointing": True}),
        ("dpo", LORA),
        slow("reward", {}),
        slow("kto", {}),
        slow("sft", {}),
        slow("sft", {"bf16": True}),
        slow("sft", {"gradient_checkpointing": True}),
        slow("sft", {"gradient_accumulation_steps": 2}),
        slow("sft", LORA),
        slow("dpo", {}),
        slow("sft", CALIBRATED | {"activation": "gelu"}),
        slow("sft", CALIBRATED | {"affine_learning_rate": 0.01}),
    ],
    ids=lambda value: value if isinstance(value, str) else "lora" if "lora_r" in value else "-".join(value),
)
def test_a_real_training_peaks_where_the_plan_says(kind, options, workshop: Workshop, monkeypatch):
    """What torch allocates in two steps of the tiny GPT-2 by TRL's trainers, every batch padded: no more than planned
    (but 2 in 1000: a batch's ids and masks), and at most a tenth less (a few tensors of one layer, which a model of
    two layers shows)."""
    # Of TRL's 32 768, so that the layers, not the head's tile, are most of it.
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 512)
    batch, length = 4, 96
    words = [length if row % 2 == 0 else 4 for row in range(batch * options.get("gradient_accumulation_steps", 1))]
    if kind == "reward":
        # Without an LM head, a tensor of one attention layer is a fifth of the tiny GPT-2's memory: the nano's. TRL
        # leaves out what is longer than max_length; this word has three tokens.
        monkeypatch.setattr(workshop, "model", str(nano_path()))
        words = [length // 3 - 1 if count == length else count for count in words]
    texts = [" ".join(["river"] * count) for count in words]
    rows = [{"text": text} for text in texts]
    if kind in ("dpo", "reward"):
        rows = [{"prompt": "the", "chosen": " " + text, "rejected": " stone"} for text in texts]
    if kind == "kto":
        rows = [{"prompt": "the", "completion": " " + text, "label": i % 2 == 0} for i, text in enumerate(texts)]
    sizes = {"per_device_train_batch_size": batch, "max_length": length, "lora_dropout": 0.05}
    data = workshop.data(kind, train=rows)
    _, trainer = workshop.trainer(kind, "real", **(sizes | options | {"max_steps": 2, "dataset_name": data}))
    models = [trainer.model, *([trainer.ref_model] if getattr(trainer, "ref_model", None) else [])]
    held = {tensor.untyped_storage() for model in models for tensor in (*model.parameters(), *model.buffers())}
    weights = sum(storage.nbytes() for storage in held)
    measured = weights + peak_memory(trainer.train, torch.device("cpu"))

    known = {key: value for key, value in options.items() if key in Job.__annotations__}
    known.setdefault("calibration", "none")
    job = replace(CPU, trainer=kind, per_device_train_batch_size=batch, max_length=length, **known)
    config = load_config(workshop.model)
    planned = single_gpu(Steps(prepared_config(config, job), job)).total
    assert measured * 0.998 <= planned <= measured * 1.1, (measured, planned)


@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        ({"activation": "native"}, 4),  # gate, its activation, up, and their product
        ({}, 3),  # CRReLU's gated product is one pass: gate, up, product
        ({"recompute_activation": True}, 2),
    ],
)
def test_what_a_gated_mlp_keeps(options, tensors):
    """Counted by hand, in float32 without checkpointing: twice the width keeps so many more tensors of that width.

    And a copy of scale, shift, gain and offset, where the activation is calibrated.
    """
    kept = [step(wide_llama(intermediate_size=width), replace(CPU, **options)).kept for width in (1024, 2048)]
    four = 0 if options.get("activation") == "native" else 4
    assert kept[1] - kept[0] == 6 * (tensors * 2 * 32 + four) * 1024 * 4


def test_sampling_holds_the_keys_and_values_of_all_answers(llama):
    """GRPO: of every answer of an optimiser step, in both halves, whatever goes through the model at a time."""
    job = replace(CPU, trainer="grpo", gradient_accumulation_steps=64, max_length=64)
    few, many = step(llama, replace(job, gradient_accumulation_steps=32)), step(llama, job)
    answers, width = 32 * job.per_device_train_batch_size, llama.num_key_value_heads * llama.head_dim
    cache = 2 * llama.num_hidden_layers * answers * job.max_length * width * 4
    assert many.activations - few.activations >= cache


@pytest.mark.parametrize("base", [GPU, replace(GPU, gradient_checkpointing=True), replace(GPU, use_peft=True)])
def test_recomputing_takes_no_more(base, llama):
    plain, less = step(llama, base), step(llama, replace(base, recompute_activation=True))
    assert less.activations <= plain.activations and less.kept <= plain.kept
    assert less.gradients == plain.gradients


def test_recomputing_saves_one_output_a_layer(llama):
    saved = step(llama, GPU).kept - step(llama, replace(GPU, recompute_activation=True)).kept
    assert saved == 6 * 2 * 32 * 1024 * 2  # layers x rows x tokens x channels x bf16


def test_checkpointing_keeps_less(llama):
    assert step(llama, replace(GPU, gradient_checkpointing=True)).kept < step(llama, GPU).kept / 2


def test_adapters_have_fewer_gradients(llama):
    full, lora = step(llama, GPU), step(llama, replace(GPU, use_peft=True))
    assert lora.counts.trainable == lora.counts.adapters < full.counts.trainable == full.counts.total
    assert lora.counts.total == full.counts.total + lora.counts.adapters
    assert lora.gradients == lora.counts.trainable * 4


@pytest.mark.parametrize(("per", "each"), [("layer", 1), ("channel", 1024)])
def test_epsilon_is_counted(per, each, llama):
    native = step(llama, replace(GPU, activation="native")).counts
    crrelu = step(llama, replace(GPU, epsilon_per=per)).counts
    assert (native.epsilon, crrelu.epsilon) == (0, 6 * each)
    assert crrelu.total == native.total + 6 * each


def test_tied_weights_count_once():
    tied, untied = (tiny_config("llama", tie_word_embeddings=tie) for tie in (True, False))
    first, second = step(tied, GPU), step(untied, GPU)
    assert second.counts.total - first.counts.total == 97 * 32
    assert second.gradients - first.gradients == 97 * 32 * 4
    assert (first.counts.embedding, second.counts.embedding) == (0, 97 * 32)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_text", "bloom", "opt", "phi3"])
def test_other_families(family):
    try:
        found = step(tiny_config(family), replace(GPU, recompute_activation=True))
    except InputError as error:
        if IS_RELEASE:
            raise
        pytest.skip(f"refused in one line with transformers {transformers.__version__}: {error}")
    assert found.counts.epsilon > 0
    assert found.gradients == found.counts.total * 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_planned_in_bfloat16_if_in_nothing_else(family):
    job = replace(GPU, dtype="bfloat16")
    found = step(tiny_config(family), job, torch.bfloat16)
    assert found.gradients == found.counts.total * 2 + found.counts.epsilon * 2  # ε is float32
    try:
        found = step(tiny_config(family), GPU)
    except InputError as error:  # up to torch 2.13: a product of experts without contents takes nothing else
        assert "its experts take --dtype bfloat16" in str(error)
    else:
        assert found.gradients == found.counts.total * 4


def test_a_family_that_needs_values_is_refused_in_one_line():
    config = family_config("xlm")
    with pytest.raises(InputError) as caught:
        step(config, GPU)
    assert "xlm" in str(caught.value) and "\n" not in str(caught.value)
