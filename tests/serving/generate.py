"""Run by vLLM's Python: greedy tokens and log-probabilities of several checkpoints, each with a line of options.

python generate.py REQUESTS.json: a list of {model, prompts (token ids), options, adapter, out}.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Answers every request; a refusal is written where the answer would be."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0, max_tokens=16, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    for request in json.loads(Path(sys.argv[1]).read_text()):
        try:
            llm = LLM(request["model"], max_model_len=128, enforce_eager=True, **request["options"])
            adapter = LoRARequest("adapter", 1, request["adapter"]) if request.get("adapter") else None
            prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
            answers = [told(entry) for entry in llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)]
            del llm
        except Exception as error:
            answers = {"error": f"{type(error).__name__}: {error}"}
        Path(request["out"]).write_text(json.dumps(answers))


def told(entry) -> dict:
    """One answer: the new tokens, and the log-probability of every token but the first."""
    answer = entry.outputs[0]
    tokens = [*entry.prompt_token_ids[1:], *answer.token_ids]
    found = [*entry.prompt_logprobs[1:], *answer.logprobs]
    logprobs = [values[token].logprob for token, values in zip(tokens, found, strict=True)]
    return {"tokens": list(answer.token_ids), "logprobs": logprobs}


if __name__ == "__main__":
    main()
