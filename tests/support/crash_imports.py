"""Everything that a training command imports, for the server that children are forked from."""

import gc
import importlib
import os
import pkgutil

# A fork has one thread: none may have been started before it.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"OMP_NUM_THREADS": "1"}

for name in (
    "accelerate.commands.launch",
    "bitsandbytes",
    "crrelu_llm.cli.compare",
    "crrelu_llm.cli.main",
    "crrelu_llm.cli.patch",
    "crrelu_llm.cli.training",
    "crrelu_llm.comparison.matrix",
    "crrelu_llm.report",
    "crrelu_llm.comparison.results",
    "crrelu_llm.data",
    "crrelu_llm.evaluation.perplexity",
    "crrelu_llm.patching.calibration.finished_layers",
    "crrelu_llm.training.kinds.dpo",
    "crrelu_llm.training.kinds.grpo",
    "crrelu_llm.training.kinds.kto",
    "crrelu_llm.training.kinds.reward",
    "crrelu_llm.training.kinds.rloo",
    "crrelu_llm.training.kinds.sft",
    "crrelu_llm.training.run",
    "peft.peft_model",
    "transformers.models.gpt2.modeling_gpt2",
    "trl.trainer.distillation_trainer",
    "transformers.models.gpt2.tokenization_gpt2",
):
    importlib.import_module(name)
if pkgutil.find_loader("deepspeed"):  # Accelerate imports it in the first training where it is installed
    import deepspeed  # noqa: F401
gc.collect()
gc.freeze()  # else every child goes through all these modules whenever it collects
