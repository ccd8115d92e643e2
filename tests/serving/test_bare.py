"""A standalone checkpoint in an environment that never had this package: TRL's own command and lm-eval's."""

import json
import math
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from environments import environment, interpreter
from runs import sentence, sft_rows, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.serving


def ran(folder, command, *arguments):
    """What a command of the bare environment, `python` among them, printed."""
    programs = Path(interpreter("CRRELU_BARE")).parent
    variables = environment(None, folder, PATH=f"{programs}:{os.environ['PATH']}")
    whole = [str(programs / command), *arguments]
    done = subprocess.run(whole, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_environment_is_bare(checkpoints):
    found = ran(checkpoints, "python", "-c", "import importlib.util as u; print(u.find_spec('crrelu_llm'))")
    assert found == "None\n"


def test_trl_trains_it_and_epsilon_with_it(checkpoints, tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", sft_rows(16))
    options = ["--max_steps", "2", "--learning_rate", "1e-2", "--use_cpu", "--bf16", "False", "--report_to", "none"]
    options += ["--per_device_train_batch_size", "2", "--max_length", "48", "--gradient_checkpointing", "False"]
    model = ["--model_name_or_path", str(checkpoints / "llama-alone"), "--trust_remote_code"]
    ran(tmp_path, "trl", "sft", *model, "--dataset_name", str(tmp_path / "data"), "--output_dir", "out", *options)
    before = load_file(checkpoints / "llama-alone" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    epsilons = [name for name in before if name.endswith(".epsilon")]
    assert len(epsilons) == 2 and all(not torch.equal(before[name], after[name]) for name in epsilons)
    affine = [name for name in before if name.endswith((".scale", ".shift", ".gain", ".offset"))]
    assert len(affine) == 8 and all(torch.equal(before[name], after[name]) for name in affine)
    load = "from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained('out', {})).__name__)"
    assert "CRReLUForCausalLM" in ran(tmp_path, "python", "-c", load.format("trust_remote_code=True"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"  # with ours


def test_lm_eval_measures_what_the_package_computes(checkpoints, tmp_path):
    generator = random.Random(3)
    texts = [sentence(generator, 12) for _ in range(6)]
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(task))
    model = f"pretrained={checkpoints / 'llama-alone'},trust_remote_code=True,dtype=float32"
    command = ["--model", "hf", "--model_args", model, "--tasks", "texts", "--include_path", str(tmp_path)]
    ran(tmp_path, "lm_eval", *command, "--device", "cpu", "--output_path", "out")
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["texts"]["bits_per_byte,none"]
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "llama-crrelu").eval()
    tokenizer, bits = AutoTokenizer.from_pretrained(checkpoints / "llama-crrelu"), 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        bits -= logprobs.sum().item() / math.log(2)
    assert found == pytest.approx(bits / sum(len(text.encode()) for text in texts), rel=1e-5)
