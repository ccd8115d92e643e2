"""`crrelu plan`: memory per GPU of a training run under each Accelerate configuration, from the config alone."""

import json
from dataclasses import fields
from typing import Any

from crrelu_llm.cli.parser import Parser
from crrelu_llm.training.kinds import KINDS


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu plan",
        description="What a GPU would hold in training (weights, gradients, optimiser, activations), for each file "
        "of recipes/accelerate_configs, and which to take. Plays one step through from the config alone, no weights.",
        epilog="example: crrelu plan meta-llama/Llama-3.1-8B --gpus 8 --per_device_train_batch_size 4",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub name, local directory, .gguf file, builtin:nano, or a config.json")
    add("--gpus", type=int, default=1, help="how many, in all (default: 1)")
    add("--gpus_per_node", type=int, default=8, help="how many one machine has (default: 8)")
    add("--gpu_memory", type=float, default=80, help="GiB of one GPU (default: 80)")
    add("--trainer", choices=tuple(KINDS), default="sft", help="(default: sft)")
    add("--activation", default="crrelu", help="crrelu, a name of transformers' ACT2FN, or native (default: crrelu)")
    add("--epsilon_per", choices=("layer", "channel"), default="layer", help="(default: layer)")
    add("--calibration", choices=("none", "fit", "refit"), default="fit", help="(default: fit)")
    add("--affine_learning_rate", type=float, default=0.0, help="above 0, trains what calibration sets (default: 0)")
    for name, default, text in (
        ("per_device_train_batch_size", 8, "rows (or pairs) a GPU at a time"),
        ("max_length", 1024, "tokens a row (of a sampled answer with its prompt)"),
        ("gradient_accumulation_steps", 1, "above 1, gradients stay while the next batch computes"),
        ("lora_r", 16, "rank of the adapters"),
    ):
        add(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the loaded weights (default: float32)")
    switches = (
        ("gradient_checkpointing", True, "keep a layer's input alone, and compute the layer again (default: true)"),
        ("bf16", None, "compute in bfloat16 (default: true; with --use_cpu false)"),
        ("recompute_activation", False, "keep no output of CRReLU for the backward pass"),
        ("use_peft", False, "train LoRA adapters on every linear layer"),
        ("load_in_4bit", False, "with use_peft: QLoRA"),
        ("precompute_ref_log_probs", False, "DPO and KTO: no reference model while training"),
        ("use_cpu", False, "plan for one process on a CPU"),
        ("trust_remote_code", False, "allow the model's own code to run"),
    )
    for name, switch, text in switches:
        add(f"--{name}", type=_bool, nargs="?", const=True, default=switch, metavar="BOOL", help=text)
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    if args.bf16 is None:
        args.bf16 = not args.use_cpu
    from crrelu_llm.cli.quiet import quieten_libraries
    from crrelu_llm.planning.job import Job, load_config
    from crrelu_llm.planning.plan import plan
    from crrelu_llm.planning.table import text

    quieten_libraries()
    job = Job(**{entry.name: getattr(args, entry.name) for entry in fields(Job)})
    config = load_config(args.model, args.trust_remote_code)
    document: dict[str, Any] = {"model": args.model}
    document |= plan(config, job, args.gpus, args.gpus_per_node, args.gpu_memory)
    print(json.dumps(document, indent=2) if args.json else text(document))
    return 0


def _bool(text: str) -> bool:
    from transformers.hf_argparser import string_to_bool

    return string_to_bool(text)
