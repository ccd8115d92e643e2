"""`crrelu sft|dpo|kto|…`: one training run of a recipe."""

import os
import sys


def run(argv: list[str], kind: str) -> int:
    """Parses a recipe with TRL's parser, runs the training, and says where the result is."""
    from crrelu_llm.training.arguments import make_parser, read_recipe
    from crrelu_llm.training.kinds import kind_of

    if not argv or "-h" in argv or "--help" in argv:
        make_parser(kind, epilog=f"example: {kind_of(kind).example}").print_help()
        return 0
    from crrelu_llm.training.launch import relaunch_if_asked

    own = {action.dest for action in make_parser(kind)._actions}
    status = relaunch_if_asked([kind], argv, read_recipe(argv)[1], own)
    if status is not None:
        return status
    from crrelu_llm.training.run import run_recipe

    record = run_recipe(kind, argv)
    output_dir = record["recipe"].get("output_dir") or "trainer_output"
    seconds, speed = record["train_seconds"], record["tokens_per_second"]
    took = f" in {seconds:.0f} s ({speed:.0f} tokens/s)" if seconds and speed else ""
    if os.environ.get("RANK", "0") == "0":
        print(f"trained {record['steps']} steps{took}; model and run.json are in {output_dir}", file=sys.stderr)
    return 0
