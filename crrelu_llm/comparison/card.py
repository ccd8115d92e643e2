"""The Hugging Face model card of a patched checkpoint: ε per layer, calibration, training and results."""

import json
from pathlib import Path
from typing import Any

from crrelu_llm.comparison.arms import number as grid_value
from crrelu_llm.errors import InputError
from crrelu_llm.patching import loading, mixture
from crrelu_llm.patching.standalone import is_standalone
from crrelu_llm.report.contents import is_evaluation
from crrelu_llm.report.render import escape_markdown
from crrelu_llm.report.schema import Arm, Data, Report
from crrelu_llm.report.text import grid_label, number

FILE = "README.md"
PAPER = "arXiv 2405.12954"
_FILES = (".gz", ".zst", ".json", ".jsonl", ".parquet", ".txt", ".text", ".csv", ".gguf")


def card(checkpoint: Path, report: Report | None = None, arm: str | None = None) -> str:
    """Writes the card of a checkpoint as Markdown with metadata that the Hub reads.

    Args:
        checkpoint: The directory of a patched checkpoint that `crrelu patch`, `sft` or `dpo` wrote, or of a LoRA
            adapter of such a checkpoint.
        report: The report of a comparison or an evaluation, whose metrics go into the card's metadata.
        arm: The arm of the report that this checkpoint belongs to; optional if the report has one CRReLU arm.

    Raises:
        InputError: The directory has no patched checkpoint, or the report has no such arm with a finished run.
    """
    from huggingface_hub import ModelCardData

    section, sites = _patched(checkpoint)
    patch = _patch_report(checkpoint)
    run = _read(checkpoint / "run.json") or {}
    entry = None if report is None else _find(report, arm)
    if entry is not None and entry.activation != section["activation"]:
        raise InputError(
            f"--arm {entry.arm}: its activation is {entry.activation}, but {checkpoint} has "
            f"{section['activation']}; name the arm that this checkpoint belongs to"
        )
    entry = None if entry is None else _at_its_grid(entry, run, checkpoint)
    base = patch.get("model") or (run.get("recipe") or {}).get("model_name_or_path")
    data = ModelCardData(
        library_name="peft" if (checkpoint / "adapter_config.json").is_file() else "transformers",
        pipeline_tag=loading.TASKS[_head(checkpoint)],
        # The Hub links base models by their Hub names; a local path is not such a name.
        base_model=base if isinstance(base, str) and _is_hub_name(base) else None,
        tags=["crrelu", *mixture.names_of(section["activation"]), *([run["kind"]] if run.get("kind") else [])],
        datasets=_hub_names(report, run) or None,
        model_name=checkpoint.resolve().name if entry is not None else None,
        eval_results=None if report is None or entry is None else _results(report, entry, _head(checkpoint)),
    )
    parts = [_introduction(checkpoint, section, base), _use(checkpoint), _table(section, sites, patch)]
    parts += [_calibration(patch)] if patch else []
    parts += [_training(run)] if run.get("kind") else []
    parts += [_evaluation(report, entry)] if report is not None and entry is not None else []
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _patched(checkpoint: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Reads the crrelu section of the config, and ε of every site from the weights."""
    from safetensors import SafetensorError, safe_open

    adapter = _read(checkpoint / "adapter_config.json")
    home = checkpoint if adapter is None else Path(adapter.get("base_model_name_or_path") or "")
    section = (_read(home / "config.json") or {}).get("crrelu")
    if (
        not isinstance(section, dict)
        or not {"activation", "epsilon_per", "sites"} <= section.keys()
        or not (_are_sites(section["sites"]) and all("original" in site for site in section["sites"]))
    ):
        raise InputError(
            f"{checkpoint}: not a checkpoint that crrelu_llm patched (its config.json has no crrelu section); give "
            "the output_dir of `crrelu patch`, `sft` or `dpo`"
        )
    epsilon: dict[str, list[float]] = {}
    # An adapter that did not train ε has none; its ε is that of the base model.
    for file in [*sorted(home.glob("*.safetensors")), *sorted(checkpoint.glob("*.safetensors"))]:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    if name.endswith(".epsilon"):
                        path = name.removeprefix("base_model.model.").removesuffix(".epsilon")
                        epsilon[path] = weights.get_tensor(name).flatten().tolist()
        except SafetensorError as error:
            raise InputError(f"{file}: cannot be read ({error}); copy or save the checkpoint again") from None
    return section, epsilon


def _patch_report(checkpoint: Path) -> dict[str, Any]:
    """Reads patch_report.json of a checkpoint, or of the patched checkpoint that it was trained from; else `{}`."""
    for path in (checkpoint / "patch_report.json", checkpoint / "patched" / "patch_report.json"):
        found = _read(path)
        if not found:
            continue
        numbers = ("scale_mean", "relative_error")
        sites, perplexity = found.get("sites") or [], found.get("perplexity") or {}
        whole = _are_sites(sites) and all(
            isinstance(site.get(key), int | float | None) for site in sites for key in numbers
        )
        whole = whole and isinstance(found.get("options") or {}, dict) and isinstance(perplexity, dict)
        if not whole or (perplexity and not {"tokens", "data", "before", "after"} <= perplexity.keys()):
            raise InputError(f"{path}: damaged (in sites, options or perplexity); patch again, or remove the file")
        return found
    return {}


def _are_sites(sites: Any) -> bool:
    return isinstance(sites, list) and all(isinstance(site, dict) and "path" in site for site in sites)


def _head(checkpoint: Path) -> str:
    """transformers' auto class that loads a checkpoint; for an adapter, the class of its task."""
    adapter = _read(checkpoint / "adapter_config.json")
    if adapter is not None:
        return loading.CLASSIFIER if adapter.get("task_type") == "SEQ_CLS" else loading.CAUSAL_LM
    return loading.head_of(_read(checkpoint / "config.json") or {})


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); write the file again, or remove it") from None
    return found if isinstance(found, dict) else None


def _find(report: Report, name: str | None) -> Arm:
    done = [arm for arm in report.arms if any(run.done for run in arm.runs)]
    if name is None:
        done = [arm for arm in done if arm.activation == "crrelu"]
        if len(done) != 1:
            found = ", ".join(arm.arm for arm in report.arms)
            raise InputError(f"--arm: the report has {len(done)} finished CRReLU arms; choose one of {found}")
    chosen = [arm for arm in done if name is None or arm.arm == name]
    if not chosen:
        found = ", ".join(arm.arm for arm in done) or "none"
        raise InputError(f"--arm {name}: no such arm with a finished run in the report; there are {found}")
    return chosen[0]


def _at_its_grid(arm: Arm, run: dict[str, Any], checkpoint: Path) -> Arm:
    """The arm with the runs at the grid values that the checkpoint was trained with."""
    found = {json.dumps(one.grid, sort_keys=True): one.grid for one in arm.runs if one.done}
    if len(found) < 2:
        return arm
    own = {key: grid_value(value) for key, value in (run.get("grid") or {}).items()}
    runs = [one for one in arm.runs if one.grid == own]
    if not any(one.done for one in runs):
        known = ", ".join(map(grid_label, found.values()))
        raise InputError(
            f"{checkpoint}: its run.json names none of the report's grid values ({known}); give the directory of a "
            "run of that comparison"
        )
    return arm.but(runs=runs)


def _is_hub_name(name: str) -> bool:
    if name.startswith(("builtin:", ".", "/")) or name.endswith(_FILES):  # data/x.jsonl.gz is a file
        return False
    return name.count("/") <= 1 and not Path(name).exists()


def _hub_names(report: Report | None, run: dict[str, Any]) -> list[str]:
    names = [entry.name for entry in report.data] if report else []
    names.append((run.get("recipe") or {}).get("dataset_name") or "")
    return sorted({name for name in names if name.count("/") == 1 and _is_hub_name(name)})


def _results(report: Report, arm: Arm, head: str) -> list[Any]:
    """The arm's metrics for the Hub's metadata: means over the finished runs."""
    from huggingface_hub import EvalResult

    found = []
    for name, value in _means(arm).items():
        data, metric = _data_of(report, name)
        found.append(
            EvalResult(
                task_type=loading.TASKS[head],
                dataset_type=data.name,
                dataset_name=" ".join(filter(None, (data.name, data.split))),
                metric_type=metric,
                metric_name=metric.replace("_", " "),
                metric_value=round(value, 6),
            )
        )
    return found


def _data_of(report: Report, metric: str) -> tuple[Data, str]:
    """The data on which a metric was measured, and its name there; an evaluation calls it task/metric."""
    if not is_evaluation(report):
        return report.data[-1] if report.data else Data(name="unknown", rows=0, sha256=""), metric
    (task, _, name), tasks = metric.partition("/"), report.recipe.get("tasks")
    by_task = dict(zip(tasks if isinstance(tasks, list) else [], report.data, strict=False))
    return by_task.get(task) or Data(name=task, rows=0, sha256=""), name


def _means(arm: Arm) -> dict[str, float]:
    done = [run.metrics for run in arm.runs if run.done]
    columns = {name: [value for run in done if (value := run.get(name)) is not None] for name in done[0]}
    return {name: sum(values) / len(done) for name, values in columns.items() if len(values) == len(done)}


def _introduction(checkpoint: Path, section: dict[str, Any], base: Any) -> str:
    per = "one ε per channel" if section["epsilon_per"] == "channel" else "one ε per layer"
    originals = ", ".join(sorted({str(site["original"]) for site in section["sites"]}))
    formula = "`max(0, x) + ε·x·exp(−x²/2)`"
    if section.get("density") == "fitted":
        formula = "`max(0, x) + ε·(x − μ)·exp(−(x − μ)²/2σ²)`, with μ and σ fitted to each layer's inputs"
    what = mixture.in_words(section["activation"])
    if what == "crrelu":
        what = f"CRReLU, {formula} ({PAPER}), {per}"
    if section.get("calibrated"):
        what += ", calibrated: `gain·f(scale·(x + shift)) + offset`, with these four numbers for each channel"
    # The card is public, so a local path is reduced to its last part.
    source = f" of {_code(base if _is_hub_name(str(base)) else Path(str(base)).name)}" if base else ""
    return (
        f"# {escape_markdown(checkpoint.resolve().name)}\n\n"
        f"The activation of the {len(section['sites'])} MLPs{source} "
        f"({originals}) was swapped for {what} with `crrelu_llm`."
    )


def _use(checkpoint: Path) -> str:
    name, head = json.dumps(checkpoint.resolve().name, ensure_ascii=False), _head(checkpoint)
    use = (
        "## Use\n\n```python\nimport crrelu_llm  # teaches transformers to load the patched activation\n"
        f"from transformers import {head}\n\nmodel = {head}.from_pretrained({name})\n```"
    )
    if head != loading.CAUSAL_LM:
        return use
    if (checkpoint / "adapter_config.json").is_file():
        return use + "\n\nvLLM does not load adapters that trained ε: merge this one first (`merge_and_unload`)."
    if is_standalone(_read(checkpoint / "config.json") or {}):
        use += (
            "\n\nWithout `crrelu_llm`, `modeling_crrelu.py` in this checkpoint does the same, but more slowly:\n\n"
            f"```python\nmodel = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)\n```"
        )
    code = " --trust-remote-code" if is_standalone(_read(checkpoint / "config.json") or {}) else ""
    return f"{use}\n\nServe it with vLLM: `vllm serve {checkpoint.resolve().name} --model-impl transformers{code}`."


def _table(section: dict[str, Any], epsilon: dict[str, list[float]], patch: dict[str, Any]) -> str:
    known = {site["path"]: site for site in patch.get("sites") or []}
    rows = [
        "## The layers",
        "",
        "| layer | original | ε: mean | minimum | maximum | scale | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for site in section["sites"]:
        values, found = epsilon.get(site["path"], []), known.get(site["path"], {})
        three = (sum(values) / len(values), min(values), max(values)) if values else (None, None, None)
        cells = [*three, found.get("scale_mean"), found.get("relative_error")]
        texts = ["" if value is None else f"{value:.4g}" for value in cells]
        rows.append(f"| {_code(site['path'])} | {_code(site['original'])} | " + " | ".join(texts) + " |")
    rows += [
        "",
        "Scale: the mean absolute factor that multiplies the input inside the activation; 1 without calibration. "
        "Error: the relative error of the MLP's product right after the patch.",
    ]
    return "\n".join(rows)


def _calibration(patch: dict[str, Any]) -> str:
    options = patch.get("options") or {}
    lines = ["## Calibration", "", *(f"- {escape_markdown(key)}: {_code(value)}" for key, value in options.items())]
    found = patch.get("perplexity")
    if found:
        naive = "" if found.get("after_naive") is None else f", {number(found['after_naive'])} after a plain swap"
        lines.append(
            f"- perplexity on {found['tokens']} tokens of {_code(Path(str(found['data'])).name)}: "
            f"{number(found['before'])} before, {number(found['after'])} after{naive}"
        )
    return "\n".join(lines)


def _training(run: dict[str, Any]) -> str:
    recipe = run.get("recipe") or {}
    keys = (
        "learning_rate",
        "epsilon_learning_rate",
        "affine_learning_rate",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "beta",
        "seed",
    )
    told = [f"- {key}: {_code(recipe[key])}" for key in keys if recipe.get(key) is not None]
    return "\n".join(["## Training", "", f"{run['kind'].upper()} with TRL, {run.get('steps')} steps.", "", *told])


def _evaluation(report: Report, arm: Arm) -> str:
    count = sum(run.done for run in arm.runs)
    lines = [
        "## Evaluation",
        "",
        escape_markdown(report.verdict),
        "",
        f"Means over {count} run(s) of the arm {_code(arm.arm)}:",
        "",
    ]
    lines += ["| metric | value |", "|---|---|"]
    lines += [f"| {escape_markdown(name)} | {number(value)} |" for name, value in _means(arm).items()]
    lines += ["", "```bash", report.command.replace("```", ""), "```"]
    return "\n".join(lines)


def _code(value: Any) -> str:
    return "`" + str(value).replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"
