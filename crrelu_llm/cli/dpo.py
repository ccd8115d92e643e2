"""`crrelu dpo`: one preference-tuning run."""

from crrelu_llm.cli.training import run_training


def run(argv: list[str]) -> int:
    """Runs the command."""
    return run_training("dpo", argv, "crrelu dpo --config recipes/smollm2-135m/dpo/config_lora.yaml --beta 0.5")
