"""Greedy text, log-probabilities and tokens a second of a checkpoint: `python serving.py vllm|transformers DIR OUT`.

Each in its own environment; `python serving.py compare A.json B.json` then says how they differ.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

QUESTIONS = (
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "List three fruits.",
    "Explain what a neural network is in two sentences.",
    "Translate to French: good morning.",
    "Why is the sky blue?",
    "Give me a short recipe for pancakes.",
    "Who wrote Hamlet?",
)
NEW = 64
OPTIONS = {"dtype": "float32", "max_model_len": 512, "gpu_memory_utilization": 0.5}


def prompts(directory: str) -> list[list[int]]:
    """The questions as the model's chat template puts them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in asked]


def by_vllm(directory: str, **options) -> dict:
    """One request at a time, then all at once."""
    from vllm import LLM, SamplingParams

    llm = LLM(directory, **OPTIONS, **options)
    sampling = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, ignore_eos=True)
    asked = [{"prompt_token_ids": ids} for ids in prompts(directory)]
    llm.generate(asked, sampling, use_tqdm=False)  # compiled, warm
    start = time.perf_counter()
    answers = [llm.generate([one], sampling, use_tqdm=False)[0].outputs[0] for one in asked]
    one = time.perf_counter() - start
    start = time.perf_counter()
    llm.generate(asked, sampling, use_tqdm=False)
    together = time.perf_counter() - start
    chosen = [[step[token].logprob for token, step in zip(a.token_ids, a.logprobs, strict=True)] for a in answers]
    return {"tokens": [list(a.token_ids) for a in answers], "logprobs": chosen} | speeds(one, together)


def by_transformers(directory: str, trust_remote_code: bool = False) -> dict:
    """The same through `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    with contextlib.suppress(ImportError):  # a bare environment has it not
        import crrelu_llm  # noqa: F401
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    asked = [torch.tensor([ids]) for ids in prompts(directory)]
    longest = max(ids.shape[1] for ids in asked)
    padded = torch.cat([torch.nn.functional.pad(ids, (longest - ids.shape[1], 0)) for ids in asked])
    mask = torch.cat([torch.arange(longest)[None] >= longest - ids.shape[1] for ids in asked]).long()
    for warm in ({"inputs": asked[0]}, {"inputs": padded, "attention_mask": mask}):  # CRReLU's loops are compiled
        model.generate(**warm, **options | {"max_new_tokens": 4})
    start = time.perf_counter()
    answers = [model.generate(ids, **options)[0, ids.shape[1] :] for ids in asked]
    one = time.perf_counter() - start
    start = time.perf_counter()
    model.generate(padded, attention_mask=mask, **options)
    together = time.perf_counter() - start
    logprobs = []
    for ids, answer in zip(asked, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([ids[0], answer])[None]).logits[0, ids.shape[1] - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].tolist())
    return {"tokens": [answer.tolist() for answer in answers], "logprobs": logprobs} | speeds(one, together)


def speeds(one: float, together: float) -> dict:
    """New tokens a second."""
    return {"one_at_a_time": len(QUESTIONS) * NEW / one, "all_at_once": len(QUESTIONS) * NEW / together}


def compare(first: str, second: str) -> str:
    """In how many answers the tokens are equal, and the largest difference of log-probabilities while they are."""
    a, b = (json.loads(Path(name).read_text()) for name in (first, second))
    largest, equal = 0.0, 0
    for mine, other, p, q in zip(a["tokens"], b["tokens"], a["logprobs"], b["logprobs"], strict=True):
        equal += mine == other
        same = next((at for at, (x, y) in enumerate(zip(mine, other, strict=True)) if x != y), len(mine))
        largest = max(largest, *(abs(x - y) for x, y in zip(p[:same], q[:same], strict=True)))
    return f"{equal} of {len(a['tokens'])} answers equal, largest difference of log-probabilities {largest:.1e}"


if __name__ == "__main__":
    what, *names = sys.argv[1:]
    if what == "compare":
        print(compare(*names))
    else:
        directory, out, *options = names
        chosen = dict(option.split("=", 1) for option in options)
        chosen = {key: json.loads(value) for key, value in chosen.items()}
        found = (by_vllm if what == "vllm" else by_transformers)(directory, **chosen)
        Path(out).write_text(json.dumps(found))
        print({key: round(value, 1) for key, value in found.items() if isinstance(value, float)})
