"""`crrelu eafo fit`: the density of every site's pre-activations, and the correction that it gives."""

import json
import shlex
import sys
from typing import Any

from crrelu_llm.cli.eafo.common import add_model, check
from crrelu_llm.cli.parser import Parser


def _parser() -> Parser:
    parser = Parser(
        prog="crrelu eafo fit",
        description="Measure the pre-activations of every site: moments, a smooth density, the correction that this "
        "density gives, and whether the correction of a normal, with two moments, is enough.",
        epilog="example: crrelu eafo fit HuggingFaceTB/SmolLM2-135M-Instruct --data builtin:docstrings --tokens 8192 "
        "--output_dir smollm2-densities --plot",
    )
    add_model(parser)
    parser.add_argument("--output_dir", required=True, help="directory for eafo_fit.json")
    return parser


def run(argv: list[str]) -> int:
    """Runs the command."""
    args = _parser().parse_args(argv)
    output_dir = check(args)
    assert output_dir is not None
    from crrelu_llm.eafo.models import fit, preactivations
    from crrelu_llm.environment import environment
    from crrelu_llm.files import plain, write_json
    from crrelu_llm.quiet import quieten_libraries

    quieten_libraries()
    trusted = {"trust_remote_code": args.trust_remote_code}
    model, blocks = preactivations.load(args.model, args.data, args.tokens, args.images, **trusted)
    sites = fit.fit(preactivations.measure(model, blocks, args.samples, args.seed))
    document = plain(
        {
            "model": args.model,
            "data": args.data,
            **preactivations.amount(blocks),
            "samples": args.samples,
            "seed": args.seed,
            "command": shlex.join(["crrelu", "eafo", "fit", *argv]),
            "environment": environment(),
            "agreement_of_a_normal": fit.of_a_normal(args.samples, args.seed),
            "sites": sites,
        }
    )
    write_json(output_dir / fit.DOCUMENT, document)
    if args.plot:
        from crrelu_llm.eafo.models.fit_and_rank_plots import FIT_PLOT, plot_fit

        plot_fit(document, output_dir / FIT_PLOT)
    print(json.dumps(document, indent=2, ensure_ascii=False) if args.json else _table(document))
    patch = ["crrelu", "patch", args.model, "--density", "fitted", "--calibration_data", args.data]
    patch += ["--trust_remote_code"] if args.trust_remote_code else []
    print(
        f"saved to {output_dir}; to patch with centres and widths from this data (a patch measures each site after "
        "patching the sites before it, so its values differ a little):",
        file=sys.stderr,
    )
    count, number = next(iter(preactivations.amount(blocks))), args.tokens
    number = args.images if count == "images" else number
    print(
        f"  {shlex.join([*patch, f'--calibration_{count}', str(number), '--output_dir', 'patched'])}", file=sys.stderr
    )
    return 0


def _table(document: dict[str, Any]) -> str:
    from crrelu_llm.eafo.models.preactivations import amount_of

    sites = document["sites"]
    width = max(len(site["path"]) for site in sites)
    lines = [
        f"{document['model']} on {amount_of(document)} of {document['data']}",
        f"{'site':{width}}  {'μ':>7} {'σ':>7} {'skew':>6} {'kurt':>7} {'x>0':>5} {'entropy':>8} {'negentr':>8}  "
        f"{'fitted':>13}  {'standard':>13}",
    ]
    for site in sites:
        fitted, standard = site["agreement"]["fitted"], site["agreement"]["standard"]
        lines.append(
            f"{site['path']:{width}}  {site['mean']:7.3f} {site['std']:7.3f} {site['skewness']:6.2f} "
            f"{site['kurtosis']:7.2f} {site['positive']:5.1%} {site['entropy']:8.3f} {site['negentropy']:8.4f}  "
            f"{_pair(fitted):>13}  {_pair(standard):>13}"
        )
    lines.append(
        "μ, σ: centre and width of the fitted correction; entropy and negentropy of the smooth density in nats. "
        "fitted, standard: how well\nthe correction of N(μ, σ²), and of N(0, 1), agrees with the smooth density's own "
        "for ReLU, on x > 0 / on the whole line (1 = up to a factor; "
        f"samples of a true\nnormal give {document['agreement_of_a_normal']:.3f})"
    )
    return "\n".join(lines)


def _pair(agreement: dict[str, float | None]) -> str:
    return " /".join("   –  " if value is None else f"{value:6.3f}" for value in agreement.values())
