"""Perplexity of a model on texts before and after a patch, in one process; one JSON line on stdout.

    python prepare.py DATA_DIR          # makes calibration.jsonl, hh.jsonl and lambada.jsonl from the data sets
    python measure.py smollm2-135m-instruct --calibration fit --epsilon_per channel \\
        --text wikitext-2=wikitext-2/valid.txt.gz --text hh=hh.jsonl --text lambada=lambada.jsonl
"""

import argparse
import json
import resource

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crrelu_llm import patch
from crrelu_llm.data import language_modelling_blocks
from crrelu_llm.evaluation.perplexity import perplexity
from crrelu_llm.patching.calibration.text import block_size

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--activation", default="crrelu")
parser.add_argument("--calibration", default="fit")
parser.add_argument("--epsilon_per", default="channel")
parser.add_argument("--calibration_data", default="calibration.jsonl")
parser.add_argument("--calibration_tokens", type=int, default=16384)
parser.add_argument("--load_in_4bit", action="store_true")
parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
parser.add_argument("--tokens", type=int, default=6144)
args = parser.parse_args()

options = {"dtype": torch.float32}
if args.load_in_4bit:
    from transformers import BitsAndBytesConfig

    options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, **options).eval()
size = block_size(model.config)
texts = {name: file for name, _, file in (text.partition("=") for text in args.text)}
blocks = {name: language_modelling_blocks(file, tokenizer, args.tokens, size, "test") for name, file in texts.items()}


def measured():
    """Perplexity by text, of few blocks at a time: a large vocabulary makes large logits."""
    return {name: perplexity(model, found, batch_size=1) for name, found in blocks.items()}


before = measured()
chosen = {
    name: getattr(args, name) for name in ("calibration", "epsilon_per", "calibration_data", "calibration_tokens")
}
report = patch(model, args.activation, tokenizer=tokenizer, **chosen)
after = measured()
errors = [site["relative_error"] for site in report.sites if site["relative_error"] is not None]
spent = report.calibration or {}
row = {"model": args.model, "activation": args.activation, **chosen, "load_in_4bit": args.load_in_4bit} | {
    "before": {name: round(value, 3) for name, value in before.items()},
    "after": {name: round(value, 3) for name, value in after.items()},
    "ratio": {name: round(after[name] / before[name], 4) for name in before},
    "relative_error": [round(error, 4) for error in errors],
    "calibration_seconds": spent.get("seconds") and round(spent["seconds"], 1),
    "times_two_forward_passes": spent.get("forward_seconds") and round(spent["seconds"] / spent["forward_seconds"], 2),
    "kept": {kept: sum(site["kept"] == kept for site in report.sites) for kept in ("none", "fit", "refit")},
    "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    "threads": torch.get_num_threads(),
}
print(json.dumps(row), flush=True)
