"""Plots of `fit` (densities and corrections of a few layers) and of `rank` (entropies, and losses against them)."""

from pathlib import Path
from typing import Any

from crrelu_llm.eafo.models.preactivations import amount_of
from crrelu_llm.files import write_figure

FIT_PLOT, RANK_PLOT, LOSS_PLOT = "eafo_fit.png", "eafo_rank.png", "eafo_losses.png"
_OURS, _OTHERS, _THIRD = "#1f6f8b", "#c4472b", "#b8b8b8"
_MOST = 4  # layers in a plot: more would be unreadable side by side
_STYLE: dict[Any, Any] = {"text.parse_math": False, "font.size": 8, "svg.hashsalt": "crrelu"}


def plot_fit(document: dict[str, Any], path: Path) -> None:
    """Draws a few sites' densities with their normals, and the corrections of both.

    Args:
        document: As in eafo_fit.json.
        path: The image file to write; the suffix sets the format (`.png`, `.svg`, `.pdf`).
    """
    import matplotlib
    from matplotlib.figure import Figure

    sites = document["sites"]
    count = min(_MOST, len(sites))
    chosen = [sites[round(index * (len(sites) - 1) / max(count - 1, 1))] for index in range(count)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.6 * count + 0.4, 4.2), layout="constrained")
        axes = figure.subplots(2, count, squeeze=False, sharex="col")
        for column, site in enumerate(chosen):
            curves = site["curves"]
            for row, (own, normal) in enumerate((("density", "normal"), ("correction", "normal_correction"))):
                axis = axes[row, column]
                axis.axvline(0, color=_THIRD, lw=0.8)
                axis.plot(curves["x"], curves[own], color=_OURS, label="smooth density")
                axis.plot(curves["x"], curves[normal], "--", color=_OTHERS, label="normal of its μ and σ")
                axis.spines[["top", "right"]].set_visible(False)
            agreement = site["agreement"]["fitted"]["whole"]
            axes[0, column].set_title(f"{site['path']}\nμ {site['mean']:.2f}, σ {site['std']:.2f}", fontsize=7)
            axes[1, column].set_title(f"agreement {agreement:.3f}" if agreement is not None else "", fontsize=7)
            axes[1, column].set_xlabel("pre-activation")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        axes[0, 0].set_ylabel("density")
        axes[1, 0].set_ylabel("correction of ReLU, p′")
        figure.suptitle(f"{document['model']}: {amount_of(document)} of {document['data']}", fontsize=9)
        write_figure(path, figure, dpi=150)


def plot_rank(document: dict[str, Any], directory: Path) -> None:
    """Plots the entropies of each model and, if there is a comparison, its losses against them.

    Args:
        document: As in eafo_rank.json.
        directory: Where to write the plots.
    """
    import matplotlib
    from matplotlib.figure import Figure

    models = document["models"]
    names = [entry["activation"] for entry in sorted(models[0]["means"], key=lambda entry: entry["rank"])]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.5, 1.1 + 0.24 * len(names)), layout="constrained")
        axis = figure.subplots()
        for model, marker, colour in zip(models, "osD", (_OURS, _THIRD, _OTHERS), strict=False):
            by_name = {entry["activation"]: entry for entry in model["means"]}
            values = [by_name[name]["at_resolution"] for name in names]
            errors = [by_name[name]["at_resolution_error"] for name in names]
            axis.errorbar(values, range(len(names)), xerr=errors, fmt=marker, ms=4, color=colour, label=model["state"])
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.legend(frameon=False)
        axis.set_xlabel("entropy of the output at unit variance and a resolution of 0.05, nats")
        axis.set_title(f"{document['model']}: mean over {len(models[0]['sites'])} sites", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        write_figure(directory / RANK_PLOT, figure, dpi=150)
        if document["prediction"]:
            _plot_losses(document["prediction"], directory / LOSS_PLOT)


def _plot_losses(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    labels = {"at_resolution": "entropy (unit variance, rounded), nats", "distance": "distance from the original"}
    by_name = {entry["predictor"]: entry for entry in found["predictors"]}
    for axis, (key, label) in zip(figure.subplots(1, 2, sharey=True), labels.items(), strict=True):
        for arm in found["arms"]:
            if arm[key] is None:
                continue
            axis.plot([arm[key]] * len(arm["losses"]), arm["losses"], "o", ms=3, color=_OURS, alpha=0.5)
            mean = sum(arm["losses"]) / len(arm["losses"])
            axis.annotate(arm["arm"], (arm[key], mean), xytext=(4, 2), textcoords="offset points", fontsize=6.5)
        rho = by_name[key]["spearman"]
        axis.set_title("" if rho is None else f"Spearman {rho['value']:+.2f} [{rho['low']:+.2f}, {rho['high']:+.2f}]")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss after fine-tuning")
    write_figure(path, figure, dpi=150)
