"""Makes the calibrated starting point of one arm as `crrelu compare` does, and measures perplexity before and after.

    calibrate.py ARM --model M --data DATA --out DIRECTORY --perplexity_tokens N OPTIONS OF THE RECIPE

The recipe is sft.yaml; dpo.yaml has the same activation section, so both comparisons can use the checkpoint.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("arm")
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--perplexity_tokens", type=int, required=True)
    args, options = parser.parse_known_args()  # unknown options belong to the recipe
    from crrelu_llm.data import language_modelling_blocks
    from crrelu_llm.errors import InputError
    from crrelu_llm.evaluation.perplexity import perplexity
    from crrelu_llm.patching import loading
    from crrelu_llm.patching.calibration.tokens import block_size
    from crrelu_llm.patching.transform import patch_checkpoint
    from crrelu_llm.training.arguments import parse

    argv = ["--config", str(HERE / "sft.yaml"), "--model_name_or_path", args.model, "--dataset_name", args.data]
    try:
        recipe = parse("sft", [*argv, "--activation", args.arm, "--output_dir", args.out, *options])
        tokenizer, config = loading.load_tokenizer(args.model), loading.load_config(args.model)
        text = "builtin:docstrings"
        blocks = language_modelling_blocks(text, tokenizer, args.perplexity_tokens, block_size(config), split="test")
        report = patch_checkpoint(
            args.model,
            recipe.activation.patch_config(),
            args.out,
            recipe.model.dtype or "float32",
            perplexity=lambda model, _: perplexity(model, blocks),
            perplexity_of={"tokens": blocks.numel(), "data": text},
            revision=recipe.model.model_revision,
        )
    except InputError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2
    found, spent = report["perplexity"], report["calibration"]
    naive = "" if found["after_naive"] is None else f", {found['after_naive']:.1f} after a plain swap"
    print(f"perplexity {found['before']:.2f} -> {found['after']:.2f}{naive}; calibrated in {spent['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
