"""Draws the differences in loss of all comparisons in this folder as one forest: `python picture.py`."""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PARTS = {"nano": "Nano GPT-2, SFT", "smollm2-sft": "SmolLM2-135M, SFT", "smollm2-dpo": "SmolLM2-135M, DPO"}
REACH = 0.06  # nats; what lies beyond is said in words
COLOURS = {"better": "#0b7a53", "worse": "#b03a12", "undecided": "#5c626b"}

rows = []
for folder, title in PARTS.items():
    report = json.loads((HERE / folder / "report.json").read_text())
    rows.append((f"{title}: loss, difference to {report['baseline']} (refitted)", None))
    for entry in report["comparisons"]:
        if (entry["metric"], entry["unit"]) == ("loss", "both"):
            rows.append((entry["candidate"], entry))

figure = Figure(figsize=(8, 0.36 * len(rows) + 0.8), layout="constrained")
axes = figure.subplots()
for place, (label, entry) in enumerate(rows):
    y = -place
    if entry is None:
        axes.text(0.0, y, label, transform=axes.get_yaxis_transform(), weight="bold", va="center", fontsize=9)
        continue
    axes.text(0.01, y, label, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    colour = COLOURS[entry["verdict"]]
    said = f"{entry['difference']:+.4f} ({entry['ci_low']:+.4f} to {entry['ci_high']:+.4f})"
    said = said.replace("-0.0000", "0.0000").replace("-", "−")
    axes.text(1.01, y, said, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=colour)
    if abs(entry["difference"]) > REACH:
        end = REACH if entry["difference"] > 0 else -REACH
        axes.annotate("", (end, y), (0.8 * end, y), arrowprops={"arrowstyle": "->", "color": colour})
        continue
    ends = [max(-REACH, entry["ci_low"]), min(REACH, entry["ci_high"])]
    axes.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot(entry["difference"], y, "o", color=colour, markersize=5)
axes.axvline(0, color="#1d2024", linewidth=0.8)
axes.axvspan(-REACH, 0, color=COLOURS["better"], alpha=0.06, linewidth=0)
axes.set(xlim=(-2.2 * REACH, REACH), ylim=(0.6 - len(rows), 0.6), yticks=[], xticks=[-0.06, -0.03, 0, 0.03, 0.06])
axes.set_xlabel("nats a token (DPO: a pair); left of 0 is better; 95 % interval over seeds and items", fontsize=8.5)
for side in ("left", "right", "top"):
    axes.spines[side].set_visible(False)
figure.savefig(HERE / "differences.png", dpi=150, facecolor="white", bbox_inches="tight")
