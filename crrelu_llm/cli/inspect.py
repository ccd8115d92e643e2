"""`crrelu inspect`: which activations of a model would be swapped; reads its config alone."""

import json

from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import InputError


def run(argv: list[str]) -> int:
    """Runs the command."""
    parser = Parser(
        prog="crrelu inspect",
        description="List the sites of a model, and the activations left alone. Reads the config, no weights.",
        epilog="example: crrelu inspect HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    parser.add_argument("model", metavar="MODEL", help="hub name, local directory, .gguf file, or builtin:nano")
    parser.add_argument("--parts", default="main", help="main, the vision tower of a multimodal model, or all")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow the model's own code to run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    from crrelu_llm.patching import loading
    from crrelu_llm.patching.section import is_calibrated, is_fitted, mlp_config_keys, read
    from crrelu_llm.patching.sites import PARTS, survey

    if args.parts not in PARTS:
        raise InputError(f"--parts must be one of {', '.join(PARTS)}, not {args.parts}")
    model = loading.skeleton(args.model, trust_remote_code=args.trust_remote_code)
    patched = read(model.config)
    sites, left_alone = survey(model, args.parts)
    keys = list(patched["config_keys"] if patched else mlp_config_keys(model, sites))
    if args.json:
        fields = ("path", "attribute", "original", "num_channels", "kind")
        document = {
            "model_type": model.config.model_type,
            "sites": [{name: getattr(site, name) for name in fields} for site in sites],
            "left_alone": [
                {"path": item.path, "activation": item.activation, "reason": item.reason} for item in left_alone
            ],
            "config_keys": keys,
        }
        print(json.dumps(document, indent=2))
        return 0
    state = f", patched to {patched['activation']}" if patched else ""
    state += ", density fitted" if patched and is_fitted(patched) else ""
    state += ", calibrated" if patched and is_calibrated(patched) else ""
    print(f"{model.config.model_type}: {len(sites)} sites{state}")
    for site in sites:
        print(f"  {site.path}  {site.original}  {site.num_channels} channels  {site.kind}")
    for item in left_alone:
        print(f"  left alone: {item.path}  {item.activation}  ({item.reason})")
    print("config keys that mean the MLP alone: " + (", ".join(keys) or "none"))
    return 0
