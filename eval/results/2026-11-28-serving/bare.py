"""What somebody without crrelu_llm sees of a patched and of a standalone checkpoint.

`python bare.py PATCHED ALONE OUT` where crrelu_llm is not installed; where it is, `python bare.py compare PATCHED OUT`
then says how the logits differ.
"""

import importlib.util
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def session(patched: str, alone: str, out: str) -> None:
    """Loads both, with and without `trust_remote_code`; keeps the logits of a question."""
    print("crrelu_llm:", importlib.util.find_spec("crrelu_llm"))
    print("Python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)
    for directory in (patched, alone):
        try:
            AutoModelForCausalLM.from_pretrained(directory)
        except Exception as error:
            print(f"{directory}: {type(error).__name__}: {error}")
    model = AutoModelForCausalLM.from_pretrained(alone, trust_remote_code=True, dtype=torch.float32).eval()
    print(f"{alone}, trust_remote_code:", type(model).__name__, "of", type(model).__module__.rpartition(".")[2])
    tokenizer = AutoTokenizer.from_pretrained(alone)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.save((ids, model(ids).logits), out)
    print(tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]))


def compare(patched: str, out: str) -> None:
    """The same tokens by the package."""
    import crrelu_llm  # noqa: F401

    ids, alone = torch.load(out)
    model = AutoModelForCausalLM.from_pretrained(patched).eval()
    with torch.no_grad():
        ours = model(ids).logits
    largest = f"largest difference {(ours - alone).abs().max():.1e}, largest logit {ours.abs().max():.1f}"
    print(f"{ids.shape[1]} tokens, {largest}")


if __name__ == "__main__":
    compare(*sys.argv[2:]) if sys.argv[1] == "compare" else session(*sys.argv[1:])
