"""Perplexity of a model on texts before and after patches, in one process; one JSON line for each variant on stdout.

    python prepare.py DATA_DIR          # makes calibration.jsonl, hh.jsonl and lambada.jsonl from the data sets
    python measure.py smollm2-135m-instruct --variants none:channel:0 fit:channel:16384 fit:layer:16384 \\
        --text wikitext-2=wikitext-2/valid.txt.gz --text hh=hh.jsonl --text lambada=lambada.jsonl

A variant is calibration:epsilon_per:calibration_tokens. `--load_in_4bit` patches a model that is quantised already;
`--quantise 4 8` saves each patched model, loads it in 4 or 8 bits, and compares with the original loaded so.
"""

import argparse
import json
import resource
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from crrelu_llm import patch
from crrelu_llm.data import language_modelling_blocks
from crrelu_llm.evaluation.perplexity import perplexity
from crrelu_llm.patching.calibration.tokens import block_size

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--activation", default="crrelu")
parser.add_argument("--variants", nargs="+", default=["fit:channel:16384"], metavar="LEVEL:PER:TOKENS")
parser.add_argument("--calibration_data", default="calibration.jsonl")
parser.add_argument("--load_in_4bit", action="store_true")
parser.add_argument("--quantise", nargs="+", type=int, default=[], choices=(4, 8))
parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
parser.add_argument("--tokens", type=int, default=8192, help="of each text")
args = parser.parse_args()

QUANTISED = {
    None: None,
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    8: BitsAndBytesConfig(load_in_8bit=True),
}


def load(path, bits=None):
    """A model in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=QUANTISED[bits]).eval()


def measured(model):
    """Perplexity by text, of few blocks at a time: a large vocabulary makes large logits."""
    return {name: round(perplexity(model, found, batch_size=1), 4) for name, found in blocks.items()}


def ratios(after, before):
    """By text."""
    return {name: round(after[name] / before[name], 4) for name in before}


tokenizer = AutoTokenizer.from_pretrained(args.model)
bits = 4 if args.load_in_4bit else None
model = load(args.model, bits)
size = block_size(model.config)
texts = {name: file for name, _, file in (text.partition("=") for text in args.text)}
blocks = {name: language_modelling_blocks(file, tokenizer, args.tokens, size, "test") for name, file in texts.items()}
before = measured(model)
quantised_before = {kind: measured(load(args.model, kind)) for kind in args.quantise}
for variant in args.variants:
    level, per, tokens = variant.split(":")
    model = load(args.model, bits)
    options = {"calibration": level, "epsilon_per": per, "calibration_data": args.calibration_data}
    options |= {"calibration_tokens": int(tokens) or 512}
    report = patch(model, args.activation, tokenizer=tokenizer, **options)
    after, spent = measured(model), report.calibration or {}
    errors = [site["relative_error"] for site in report.sites if site["relative_error"] is not None]
    row = {"model": args.model, "activation": args.activation, **options, "load_in_4bit": args.load_in_4bit} | {
        "tokens": args.tokens,
        "before": before,
        "after": after,
        "ratio": ratios(after, before),
        "relative_error": [round(error, 4) for error in errors],
        "calibration_seconds": spent.get("seconds") and round(spent["seconds"], 1),
        "times_two_forward_passes": spent.get("forward_seconds") and spent["seconds"] / spent["forward_seconds"],
        "kept": {kept: sum(site["kept"] == kept for site in report.sites) for kept in ("none", "fit", "refit")},
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": torch.get_num_threads(),
    }
    if args.quantise:
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            del model
            for kind in args.quantise:
                quantised = measured(load(place, kind))
                row[f"in_{kind}_bits"] = {
                    "original": quantised_before[kind],
                    "patched": quantised,
                    "ratio": ratios(quantised, quantised_before[kind]),
                    "cost_of_quantising_the_original": ratios(quantised_before[kind], before),
                    "cost_of_quantising_the_patched": ratios(quantised, after),
                }
    print(json.dumps(row), flush=True)
