"""Perplexity of a model on three texts after each level of calibration; one JSON line a measurement on stdout.

    python prepare.py DATA_DIR          # makes calibration.jsonl, hh.jsonl and lambada.jsonl from the data sets
    crrelu patch SmolLM2-135M-Instruct.Q4_1.gguf --activation silu --output_dir smollm2-135m-instruct   # float32
    python measure.py smollm2-135m-instruct --calibration refit --epsilon_per channel \\
        --text wikitext-2=wikitext-2/valid.txt.gz --text hh=hh.jsonl --text lambada=lambada.jsonl
"""

import argparse
import json
import resource
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crrelu_llm import patch
from crrelu_llm.data import language_modelling_blocks
from crrelu_llm.evaluation.perplexity import perplexity

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--calibration", default="none")
parser.add_argument("--epsilon_per", default="channel")
parser.add_argument("--activation", default="crrelu", help="native: as it is")
parser.add_argument("--calibration_data", default="calibration.jsonl")
parser.add_argument("--calibration_tokens", type=int, default=32768)
parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
parser.add_argument("--tokens", type=int, default=6144)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
started = time.perf_counter()
options = ("calibration", "epsilon_per", "calibration_data", "calibration_tokens")
sites = []
if args.activation != "native":
    chosen = {name: getattr(args, name) for name in options}
    sites = patch(model, args.activation, tokenizer=tokenizer, **chosen).sites
minutes = (time.perf_counter() - started) / 60
errors = [site["relative_error"] for site in sites if site["relative_error"] is not None]
measured = {}
for text in args.text:
    name, _, file = text.partition("=")
    blocks = language_modelling_blocks(file, tokenizer, args.tokens, 512, split="test")
    measured[name] = round(perplexity(model, blocks), 3)
row = {name: getattr(args, name) for name in ("activation", *options)} | {
    "perplexity": measured,
    "mean_relative_error": round(sum(errors) / len(errors), 4) if errors else None,
    "minutes": round(minutes, 1),
    "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    "threads": torch.get_num_threads(),
}
print(json.dumps(row), flush=True)
