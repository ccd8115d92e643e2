"""Collects the results of run.sh's parts in few files: summary.txt, results.json, logs.tar.gz and the two reports.

    summary.py WORK OUT

Needs only the standard library; each file is written beside its place and renamed, so that it is always complete.
"""

import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# In the order of run.sh; other parts come after these.
ORDER = ["environment", "prepare", "tests", "calibrate-gelu", "calibrate-relu", "calibrate-crrelu", "calibrate-cpu",
         "calibration", "bench-op-bfloat16", "bench-train", "bench-mlp", "bench-op-float32", "sft", "dpo"]  # fmt: skip


def main(argv: list[str]) -> int:
    work, out = map(Path, argv)
    out.mkdir(parents=True, exist_ok=True)
    parts = [_part(work, line) for line in _lines(work / "parts.tsv")]
    parts.sort(key=lambda part: ORDER.index(part["part"]) if part["part"] in ORDER else len(ORDER))
    text = "\n".join([*_table(parts), "", *_bandwidths(parts)])
    _write(out / "results.json", json.dumps({"parts": parts}, indent=1))
    _write(out / "summary.txt", text + "\n")
    _pack(work, out / "logs.tar.gz")
    for kind in ("sft", "dpo"):
        for name in ("report.json", "report.md"):
            if (source := work / "parts" / kind / name).is_file():
                _write(out / f"{kind}.{name}", source.read_text())
    print(text)
    return 0


def _lines(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()] if path.is_file() else []


def _part(work: Path, line: list[str]) -> dict[str, Any]:
    name, status, seconds, limit, why = line
    folder = work / "parts" / name
    results = {path.stem: _json(path) for path in sorted(folder.glob("*.json")) if path.name != "report.json"}
    results |= {path.stem: _counts(path) for path in sorted(folder.glob("*.xml"))}
    found = {"part": name, "status": status, "seconds": int(seconds), "limit": int(limit), "why": why}
    return found | {"said": _said(folder, results), "results": results}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # from a part that was killed
        return {"unreadable": str(error)}


def _counts(path: Path) -> dict[str, Any]:
    """The content of a JUnit file: the number of tests by outcome, and the failed ones."""
    try:
        suite = ElementTree.parse(path).getroot().find("testsuite")
    except ElementTree.ParseError as error:
        return {"unreadable": str(error)}
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    cases = suite.findall("testcase")
    bad = [case.get("name") for case in cases if any(child.tag in ("failure", "error") for child in case)]
    why = {child.get("message", "") for case in cases for child in case if child.tag == "skipped"}
    return counts | {"failed": bad, "skipped_because": sorted(why)}


def _said(folder: Path, results: dict[str, Any]) -> str:
    """One line about the result, or the last line of the log."""
    tests, calibration = results.get("tests"), results.get("calibration")
    if tests and "tests" in tests:
        passed = tests["tests"] - tests["failures"] - tests["errors"] - tests["skipped"]
        return f"{passed} passed, {tests['failures'] + tests['errors']} failed, {tests['skipped']} skipped"
    if about := (results.get("environment") or {}).get("environment"):
        names = ("torch", "triton", "transformers", "trl", "peft")
        versions = ", ".join(f"{name} {about['versions'].get(name)}" for name in names)
        return f"{about['device']}, Python {about['python']}, {versions}"
    if calibration and "agree" in calibration:
        word = "agree" if calibration["agree"] else "do not agree"
        return f"the two calibrations {word}: perplexity ratio {calibration['perplexity_ratio']:.5f}"
    if cases := (results.get("bench") or {}).get("cases"):
        return f"{len(cases)} cases"
    log = folder / "log"
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:100]


def _table(parts: list[dict[str, Any]]) -> list[str]:
    rows = [["part", "status", "seconds", "limit", "file", "what it says"]]
    for part in parts:
        file = "" if part["status"] == "skipped" else f"logs.tar.gz: {part['part']}/log"
        said = ", ".join(filter(None, (part["why"], part["said"])))
        rows.append([part["part"], part["status"], str(part["seconds"]), str(part["limit"]), file, said])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip()
            for row in rows]  # fmt: skip


def _bandwidths(parts: list[dict[str, Any]]) -> list[str]:
    """Forward and backward together, for CRReLU's compiled backends and Liger, for every benchmark that ran."""
    lines = []
    for part in parts:
        bench = part["results"].get("bench") or {}
        for case in bench.get("cases", []):
            if not (case["name"].startswith("crrelu") or case["backend"] == "liger") or case["direction"] != "both":
                continue
            if case["backend"] in ("eager", "reference"):
                continue
            share = case["fraction_of_copy_bandwidth"]
            lines.append(
                f"{part['part']}: {case['name']}, {case['backend']}, {case['dtype']}, "
                f"{case['kind']}, {'x'.join(map(str, case['shape']))}: {case['milliseconds']:.3g} ms, "
                f"{case['ratio_to_gelu']:.2f} of GELU's" + ("" if share is None else f", {share:.0%} of a copy's GB/s")
            )
    return lines


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def _pack(work: Path, path: Path) -> None:
    """Packs the logs and results of all parts."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with tarfile.open(scratch, "w:gz") as archive:
        for file in sorted((work / "parts").rglob("*")):
            if file.is_file() and file.stat().st_size < 8_000_000:
                archive.add(file, file.relative_to(work / "parts"))
    os.replace(scratch, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
