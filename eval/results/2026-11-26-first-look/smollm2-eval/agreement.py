"""Compares `crrelu eval` with plain lm-evaluation-harness on one task, item by item.

    python agreement.py EVALUATION_DIR NAME MODEL TASKS_DIR DATA_DIR TASK LIMIT BATCH_SIZE

The evaluation is one that `crrelu eval` made of MODEL under NAME with the same limit and batch size, in float32.
Nothing of crrelu_llm computes here; it is imported so that a patched checkpoint loads.
"""

import json
import os
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import crrelu_llm  # noqa: F401

directory, name, model, tasks, data, task, limit, batch_size = sys.argv[1:]
directory, model, tasks = Path(directory).resolve(), str(Path(model).resolve()), str(Path(tasks).resolve())
os.chdir(data)  # where the task file's data files are
found = simple_evaluate(
    HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=int(batch_size)),
    tasks=[task],
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    limit=int(limit),
    bootstrap_iters=0,
)
settings = json.loads((directory / "evaluation.json").read_text())
ours = json.loads((directory / settings["results"][name][task]).read_text())["result"]
theirs = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
largest = max(
    abs(mine - float(reply[0][0] if isinstance(reply[0], (tuple, list)) else reply[0]))
    for example, sample in zip(ours["examples"], theirs, strict=True)
    for mine, reply in zip(example["responses"], sample["resps"], strict=True)
)
for key, value in found["results"][task].items():
    metric, comma, _ = key.partition(",")
    if comma and "stderr" not in metric:
        print(f"{name} {task} {metric}: lm_eval {value!r}, crrelu eval {ours['metrics'][metric]!r}")
print(f"{name} {task}: largest difference of a log-likelihood over {len(theirs)} items: {largest!r}")
