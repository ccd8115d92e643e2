"""vLLM serves patched checkpoints: the same tokens and log-probabilities as transformers, or a refusal."""

import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from environments import environment, interpreter
from runs import LORA, Workshop
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.serving
FAMILIES = ("llama", "gpt2", "gemma3_text")
PROMPTS = [list(range(10, 34)), [7, 50, 90, 33]]
BASE = {"model_impl": "transformers", "dtype": "float32", "gpu_memory_utilization": 0.3}
ALONE = BASE | {"trust_remote_code": True}


def answers(folder, site, requests, **variables):
    """What vLLM answers to several requests, `{name: (model, options[, adapter])}`, in one process of its own."""
    listed = [
        {"model": model, "prompts": PROMPTS, "options": options, "adapter": (rest or [None])[0], "out": f"{name}.out"}
        for name, (model, options, *rest) in requests.items()
    ]
    (folder / "requests.json").write_text(json.dumps(listed))
    command = [interpreter("CRRELU_VLLM"), str(Path(__file__).parent / "generate.py"), "requests.json"]
    done = subprocess.run(
        command, cwd=folder, env=environment(site, folder, **variables), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: json.loads((folder / f"{name}.out").read_text()) for name in requests}
    return found, done.stdout + done.stderr


def differences(directory, found):
    """Whether greedy tokens are those of transformers, and the largest difference of log-probabilities."""
    assert "error" not in found, found
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    model.generation_config.eos_token_id = None
    same, largest = True, 0.0
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt + answer["tokens"]])
        with torch.no_grad():
            greedy = model.generate(ids[:, : len(prompt)], max_new_tokens=16, do_sample=False)
            logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        same &= torch.equal(greedy, ids)
        largest = max(largest, (logprobs - torch.tensor(answer["logprobs"])).abs().max().item())
    return same, largest


IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def served(checkpoints, site):
    """Every family with the package, in one process."""
    requests = {name: (f"{name}-crrelu", BASE) for name in FAMILIES}
    return answers(checkpoints, site, requests | {"alone": ("llama-alone", ALONE)}, **IN_PROCESS)[0]


@pytest.mark.parametrize("name", [*FAMILIES, "alone"])
def test_it_answers_what_transformers_answers(checkpoints, served, name):
    same, largest = differences(checkpoints / ("llama-crrelu" if name == "alone" else f"{name}-crrelu"), served[name])
    assert same and largest < 1e-4


def test_without_the_package_a_standalone_checkpoint_does_and_another_fails(checkpoints):
    requests = {name: (f"{name}-alone", ALONE) for name in ("llama", "gemma3_text")}
    found, _ = answers(checkpoints, None, requests | {"plain": ("llama-crrelu", BASE)}, **IN_PROCESS)
    for name in ("llama", "gemma3_text"):
        same, largest = differences(checkpoints / f"{name}-crrelu", found[name])
        assert same and largest < 1e-4
    assert found["plain"] == {"error": "KeyError: 'crrelu'"}


def test_two_processes_share_the_channels(checkpoints, site):
    shared = BASE | {"tensor_parallel_size": 2}
    requests = {"two": ("llama-crrelu", shared), "gpt2": ("gpt2-crrelu", shared)}
    # vLLM binds each process to cores of its own, and keeps one for itself: too many for a machine of two.
    found, output = answers(checkpoints, site, requests, VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
    same, largest = differences(checkpoints / "llama-crrelu", found["two"])
    assert same and largest < 1e-4, output[-2000:]
    assert "leave --tensor-parallel-size out" in found["gpt2"]["error"]


def test_refusals(checkpoints, site):
    newer = checkpoints / "newer"
    shutil.copytree(checkpoints / "llama-crrelu", newer, dirs_exist_ok=True)
    config = json.loads((newer / "config.json").read_text())
    config["crrelu"]["version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    own = {key: value for key, value in BASE.items() if key != "model_impl"}
    requests = {f"own-{name}": (f"{name}-crrelu", own) for name in FAMILIES}
    requests["newer"] = ("newer", BASE)
    found, _ = answers(checkpoints, site, requests, **IN_PROCESS)
    for name in FAMILIES:
        assert "does not compute; serve it with --model-impl transformers" in found[f"own-{name}"]["error"]
    assert "upgrade crrelu_llm" in found["newer"]["error"]


def test_an_adapter_that_trained_epsilon_is_refused_and_merged_it_is_served(checkpoints, site, tmp_path):
    from peft import AutoPeftModelForCausalLM

    base = checkpoints / "llama-crrelu"
    Workshop(tmp_path, base).run("sft", "adapter", **LORA | {"activation": None, "max_length": 48})
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for path in (*base.glob("tokenizer*"), base / "chat_template.jinja"):
        shutil.copy(path, tmp_path / "merged")
    requests = {
        "adapter": (str(base), BASE | {"enable_lora": True, "max_lora_rank": 8}, str(tmp_path / "adapter")),
        "merged": (str(tmp_path / "merged"), BASE),
    }
    found, _ = answers(checkpoints, site, {"merged": requests["merged"]}, **IN_PROCESS)
    same, largest = differences(tmp_path / "merged", found["merged"])
    assert same and largest < 1e-4
    found, output = answers(checkpoints, site, {"adapter": requests["adapter"]})
    assert "merge the adapter into the checkpoint" in output + str(found)


@pytest.mark.parametrize("options", ["", "--use_peft --lora_r 4 --lora_target_modules q_proj v_proj"])
def test_grpo_samples_by_vllm_with_the_epsilon_of_the_step(checkpoints, site, tmp_path, options):
    command = [interpreter("CRRELU_VLLM"), str(Path(__file__).parent / "sampled.py")]
    command += [str(checkpoints / "llama-crrelu"), "seen.json", *options.split()]
    variables = environment(site, tmp_path, **IN_PROCESS)
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (tmp_path / "seen.json").is_file(), done.stderr[-3000:]
    found = json.loads((tmp_path / "seen.json").read_text())
    trained, given = ([entry[key] for entry in found["seen"]] for key in ("trained", "vllm"))
    assert trained == given and len(trained) == 3 and len(trained[0]) == 2
    assert all(abs(trained[2][site] - trained[0][site]) > 0.05 for site in range(2))
    assert len(found["differences"]) == 3 and max(found["differences"]) < 0.05


def test_the_server_answers(checkpoints, site):
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    # What `vllm serve` starts; the command itself looks for a package called vllm, and this build is called vllm-cpu.
    command = [interpreter("CRRELU_VLLM"), "-m", "vllm.entrypoints.openai.api_server", "--model", "llama-crrelu"]
    command += ["--model-impl", "transformers", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    command += ["--gpu-memory-utilization", "0.3", "--port", str(port)]
    with open(checkpoints / "server.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=checkpoints, env=environment(site, checkpoints), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wanted = {"model": "llama-crrelu", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 16, "logprobs": 0}
        wanted |= {"ignore_eos": True, "return_token_ids": True}
        body = asked(server, f"http://127.0.0.1:{port}/v1/completions", wanted, checkpoints / "server.log")
        model = AutoModelForCausalLM.from_pretrained(checkpoints / "llama-crrelu").eval()
        model.generation_config.eos_token_id = None
        expected = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=16, do_sample=False)[0].tolist()
        assert body["choices"][0]["token_ids"] == expected[len(PROMPTS[0]) :]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def asked(server, url, wanted, log):
    """The server's answer, once it is up."""
    request = urllib.request.Request(url, json.dumps(wanted).encode(), {"Content-Type": "application/json"})
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except (ConnectionError, urllib.error.URLError):
            time.sleep(1)
    raise AssertionError(f"the server did not answer: {log.read_text()[-3000:]}")
