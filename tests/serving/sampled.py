"""Run by vLLM's Python: GRPO whose answers vLLM samples in the same process: sampled.py MODEL OUT [OPTION ...]

OUT gets, for each sampling of answers, every site's ε as the trained model and as vLLM have it then, and TRL's
difference between their log-probabilities.
"""

import json
import sys
from pathlib import Path

from crrelu_llm.training.arguments import parse
from crrelu_llm.training.prepare import datasets_of
from crrelu_llm.training.trainers import build_trainer


def main() -> None:
    """Three steps."""
    model, out, *options = sys.argv[1:]
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two", "a b c")))
    Path("rewards.py").write_text("def brevity(completions, **kwargs):\n    return [-len(c) for c in completions]\n")
    recipe = parse("grpo", f"""--model_name_or_path {model} --dataset_name prompts.jsonl --output_dir trained --use_cpu
        --reward_funcs rewards.py:brevity --max_steps 3 --per_device_train_batch_size 4 --num_generations 4
        --max_completion_length 8 --learning_rate 1e-3 --epsilon_learning_rate 0.5 --report_to none --logging_steps 1
        --save_strategy no --use_vllm --vllm_mode colocate --vllm_model_impl transformers --vllm_max_model_length 64
        --vllm_gpu_memory_utilization 0.3""".split() + options)  # fmt: skip
    trainer = build_trainer(recipe, model, *datasets_of(recipe))
    vllm, seen = trainer.vllm_generation, []
    generate = vllm.generate

    def watch(*args, **kwargs):
        engine = vllm.llm.llm_engine.model_executor.driver_worker.model_runner.model
        seen.append({"trained": epsilons(trainer.model), "vllm": epsilons(engine)})
        return generate(*args, **kwargs)

    vllm.generate = watch
    trainer.train()
    key = "sampling/sampling_logp_difference/max"
    differences = [entry[key] for entry in trainer.state.log_history if key in entry]
    Path(out).write_text(json.dumps({"seen": seen, "differences": differences}))


def epsilons(model) -> list[float]:
    """ε of every site's first channel, in order; of an adapter's sites, the one that is trained."""
    names = [name for name, _ in model.named_parameters() if name.endswith("epsilon")]
    names = [name for name in names if "original_module" not in name]
    return [model.get_parameter(name).flatten()[0].item() for name in names]


if __name__ == "__main__":
    main()
