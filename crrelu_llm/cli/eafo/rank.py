"""`crrelu eafo rank`: the entropy after every site for many activations, and whether it predicts the loss."""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from crrelu_llm.cli.eafo.common import add_model, check
from crrelu_llm.cli.parser import Parser
from crrelu_llm.errors import InputError


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu eafo rank",
        description="Measure the entropy after every site for many activations. Each gets the pre-activations of the "
        "model as it is. NAME+eafo is an activation plus its own correction for the site's density.",
        epilog="example: crrelu eafo rank builtin:nano --data builtin:docstrings --untrained --output_dir ranking "
        "--plot",
    )
    add_model(parser)
    add = parser.add_argument
    add("--output_dir", help="directory for eafo_rank.json; without it, nothing is written")
    add("--activations", nargs="+", metavar="NAME", help="default: twelve common activations and six corrected ones")
    add("--epsilon", type=float, default=0.01, help="size of the corrections in NAME+eafo (default: 0.01, as CRReLU)")
    add("--untrained", action="store_true", help="also measure an untrained model of the same config")
    add("--finetuned", metavar="MODEL", help="also measure a fine-tuned checkpoint of the model")
    add(
        "--losses",
        metavar="DIR",
        help="output_dir of a finished `crrelu compare` whose arms are activations: also correlate entropy and loss "
        "(recipes/eafo/rank.yaml is a recipe for it)",
    )
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    output_dir = check(args)
    if not math.isfinite(args.epsilon):
        raise InputError(f"--epsilon must be a finite number, not {args.epsilon}")
    from crrelu_llm.eafo.models import rank
    from crrelu_llm.environment import environment
    from crrelu_llm.files import plain, write_json
    from crrelu_llm.quiet import quieten_libraries
    from crrelu_llm.studies import predict

    quieten_libraries()
    comparison = predict.read_losses(Path(args.losses)) if args.losses else None
    names = _names(args, comparison)
    document: dict[str, Any] = {
        "data": args.data,
        "samples": args.samples,
        "seed": args.seed,
        "epsilon": args.epsilon,
        "command": shlex.join(["crrelu", "eafo", "rank", *argv]),
        "environment": environment(),
    }
    document |= _measure(args, names)
    means = document["models"][0]["means"]
    document["prediction"] = predict.predict(means, comparison, args.seed) if comparison else None
    document = plain(document)
    if output_dir is not None:
        write_json(output_dir / rank.DOCUMENT, document)
        if args.plot:
            from crrelu_llm.eafo.models.fit_and_rank_plots import plot_rank

            plot_rank(document, output_dir)
        print(f"saved to {output_dir}", file=sys.stderr)
    print(json.dumps(document, indent=2, ensure_ascii=False) if args.json else _text(document))
    return 0


def _names(args: argparse.Namespace, comparison: dict[str, Any] | None) -> list[str]:
    from crrelu_llm.eafo.models import rank

    arms = [arm["activation"] for arm in comparison["arms"]] if comparison else []
    names = list(dict.fromkeys([*(args.activations or rank.ACTIVATIONS), *arms]))
    rank.check_names(names)
    return names


def _measure(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    from crrelu_llm.eafo.models import preactivations, rank

    loading = {"trust_remote_code": args.trust_remote_code}
    model, blocks = preactivations.load(args.model, args.data, args.tokens, args.images, **loading)
    if args.finetuned:  # loaded before the measurement, so that a wrong name does not waste it
        finetuned, own = preactivations.load(args.finetuned, args.data, args.tokens, args.images, **loading)
        if own.shape != blocks.shape or bool((own != blocks).any()):
            raise InputError(
                f"--finetuned {args.finetuned}: turns the data into other tokens or pixels than {args.model}"
            )
    models = [("pretrained", args.model, model)]
    if args.untrained:
        models.append(("untrained", args.model, preactivations.untrained(model, args.seed)))
    if args.finetuned:
        models.append(("finetuned", args.finetuned, finetuned))
    found = []
    for state, path, loaded in models:
        sites = preactivations.measure(loaded, blocks, args.samples, args.seed, f"Pre-activations ({state})")
        found.append({"state": state, "model": path, **rank.rank(sites, names, args.epsilon)})
    return {"model": args.model, **preactivations.amount(blocks), "models": found}


def _text(document: dict[str, Any]) -> str:
    lines = []
    for model in document["models"]:
        lines += _table(model)
    lines.append(
        "Means over the sites, in nats ± the error of drawing the samples. entropy is −∞ where an activation is flat; "
        "standardised is at unit\nvariance; rounded, at unit variance and a resolution of 0.05, is what ranks, least "
        "entropy first. distance is from the model's own\nactivation, relative to its variance. "
        f"+eafo: plus {document['epsilon']:g} times the activation's own correction for the site's density. Before "
        "any calibration,\nwhich changes scale and shift."
    )
    if document["prediction"]:
        lines += ["", *_prediction(document["prediction"])]
    return "\n".join(lines)


def _table(model: dict[str, Any]) -> list[str]:
    head = f"{'rank':>4}  {'activation':16} {'entropy':>16} {'standardised':>12} {'negentropy':>10} {'rounded':>16}"
    lines = [
        f"{model['state']}: {model['model']}, {len(model['sites'])} sites",
        f"{head} {'atoms':>6} {'distance':>8}",
    ]
    for entry in sorted(model["means"], key=lambda entry: entry["rank"]):
        finite = entry["entropy"] is not None
        distance = "–" if entry["distance"] is None else f"{entry['distance']:.4f}"
        value = f"{entry['entropy']:.4f} ± {entry['standard_error']:.4f}" if finite else "−∞"
        standardised = f"{entry['standardised']:.4f}" if finite else "−∞"
        negentropy = f"{entry['negentropy']:.4f}" if finite else "∞"
        rounded = f"{entry['at_resolution']:.4f} ± {entry['at_resolution_error']:.4f}"
        lines.append(
            f"{entry['rank']:4d}  {entry['activation']:16} {value:>16} {standardised:>12} {negentropy:>10} "
            f"{rounded:>16} {entry['atoms']:6.1%} {distance:>8}"
        )
    return [*lines, ""]


def _prediction(found: dict[str, Any]) -> list[str]:
    lines = [
        f"loss after fine-tuning ({found['directory']}, calibration {found['calibration']}): {len(found['arms'])} "
        f"arms, {len(found['seeds'])} seeds; rank correlation with {found['confidence']:.0%} interval and p-value",
        f"{'predictor':16} {'arms':>4}  {'Spearman':>36}  {'Kendall':>36}",
    ]
    for entry in found["predictors"]:
        cells = [_correlation(entry[key]) for key in ("spearman", "kendall")]
        lines.append(f"{entry['predictor']:16} {entry['n']:4d}  {cells[0]:>36}  {cells[1]:>36}")
    lines += [f"left out: {arm['arm']} ({arm['reason']})" for arm in found["left_out"]]
    return lines


def _correlation(found: dict[str, float] | None) -> str:
    if found is None:
        return "too few arms"
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}] p = {found['p_value']:.3f}"
