"""`crrelu sft`: one supervised fine-tuning run."""

from crrelu_llm.cli.training import run_training


def run(argv: list[str]) -> int:
    """Runs the command."""
    return run_training("sft", argv, "crrelu sft --config recipes/smollm2-135m/sft/config_full.yaml --max_steps 100")
