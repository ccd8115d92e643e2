"""Images on two processes: what one process trains, augmentation and mixup with it, and the same after a resume."""

import json

import pytest
import yaml
from launches import launch
from pictures import VIT, folder
from runs import losses

from crrelu_llm.cli.main import main

pytestmark = pytest.mark.slow
RECIPE = {
    "model_config": VIT, "max_steps": 8, "learning_rate": 2e-3, "logging_steps": 1, "save_strategy": "steps",
    "save_steps": 5, "report_to": "none", "seed": 0, "use_cpu": True, "disable_tqdm": True, "activation": "crrelu",
    "calibration": "none", "epsilon_learning_rate": 0.05, "crop_padding": 1, "horizontal_flip": True,
    "randaugment_ops": 2, "mixup_alpha": 0.4, "label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 4,
}  # fmt: skip


def test_two_processes_train_what_one_does(tmp_path):
    data = folder(tmp_path / "data", test=8)  # what the Trainer says of an uneven last batch depends on the batches

    def recipe(name, batch, **options):
        values = RECIPE | {"dataset_name": data, "output_dir": str(tmp_path / name), **options}
        values |= {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return ["image", "--config", str(path)]

    half = str(tmp_path / "two" / "checkpoint-5")
    launch(tmp_path, "ddp", [recipe("two", 2), recipe("again", 2, resume_from_checkpoint=half)])
    assert main(recipe("one", 4)) == 0
    two, again, alone = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("two", "again", "one"))
    assert two["environment"]["processes"] == 2
    assert losses(two) == pytest.approx(losses(alone), abs=1e-5) and len(losses(two)) == 8
    for path, value in alone["epsilon"].items():
        assert two["epsilon"][path] == pytest.approx(value, abs=1e-5)
    evaluated = [[entry["eval_loss"] for entry in run["history"] if "eval_loss" in entry] for run in (two, alone)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5) and len(evaluated[0]) == 2
    assert losses(again)[-3:] == losses(two)[-3:] and again["epsilon"] == two["epsilon"]
