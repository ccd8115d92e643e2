"""`crrelu inspect`: which activations of a model would be swapped, from the config alone."""

import json

from crrelu_llm.cli import options
from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import InputError


def run(argv: list[str]) -> int:
    """Runs the command."""
    parser = Parser(
        prog="crrelu inspect",
        description="List the sites of a model, and the activations left alone. Reads the config, not the weights.",
        epilog="example: crrelu inspect HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    options.add_model(parser)
    options.add_patch(parser, "parts")
    options.add_trust_remote_code(parser)
    options.add_json(parser)
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
