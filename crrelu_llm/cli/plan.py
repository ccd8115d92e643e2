"""`crrelu plan`: memory per GPU of a training run under each Accelerate configuration, from the config alone."""

import json
from dataclasses import fields
from typing import Any

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser
from crrelu_llm.patch_options import OPTIONS
from crrelu_llm.training.kinds import KINDS


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu plan",
        description="What a GPU would hold in training (weights, gradients, optimiser states, activations) under each "
        "file of recipes/accelerate_configs, and which file to take. Simulates one step from the config alone.",
        epilog="example: crrelu plan meta-llama/Llama-3.1-8B --gpus 8 --per_device_train_batch_size 4",
    )
    add = parser.add_argument
    options.add_model(parser, "a config.json")
    add("--gpus", type=int, default=1, help="number of GPUs in all (default: 1)")
    add("--gpus_per_node", type=int, default=8, help="number of GPUs in one machine (default: 8)")
    add("--gpu_memory", type=float, default=80, help="GiB of one GPU (default: 80)")
    add("--trainer", choices=tuple(KINDS), default="sft", help="(default: sft)")
    add("--activation", default="crrelu", help="crrelu, a name of transformers' ACT2FN, or native (default: crrelu)")
    options.add_epsilon_per(parser)
    text = f"{OPTIONS['calibration'][1]} (default: fit)"
    add("--calibration", choices=("none", "fit", "refit"), default="fit", help=text)
    add("--affine_learning_rate", type=float, default=0.0, help="above 0, trains what calibration sets (default: 0)")
    for name, default, text in (
        ("per_device_train_batch_size", 8, "rows (or pairs) of a batch on one GPU"),
        ("max_length", 1024, "tokens a row (with sampled answers: prompt and answer)"),
        ("gradient_accumulation_steps", 1, "above 1, gradients stay in memory during the next batch"),
        ("lora_r", 16, "rank of the adapters"),
    ):
        add(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights (default: float32)")
    switches = (
        ("gradient_checkpointing", True, "keep only the input of a layer, and compute it again (default: true)"),
        ("bf16", None, "compute in bfloat16 (default: true; with --use_cpu false)"),
        ("recompute_activation", *OPTIONS["recompute_activation"]),
        ("use_peft", False, "train LoRA adapters on every linear layer"),
        ("load_in_4bit", False, "QLoRA, with use_peft"),
        ("precompute_ref_log_probs", False, "DPO and KTO: no reference model during training"),
        ("use_cpu", False, "plan for one process on a CPU"),
        ("trust_remote_code", False, options.TRUST),
    )
    for name, switch, text in switches:
        add(f"--{name}", type=_bool, nargs="?", const=True, default=switch, metavar="BOOL", help=text)
    options.add_json(parser)
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    if args.bf16 is None:
        args.bf16 = not args.use_cpu
    from crrelu_llm.planning.job import Job, load_config
    from crrelu_llm.planning.plan import plan
    from crrelu_llm.planning.table import text
    from crrelu_llm.quiet import quieten_libraries

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
