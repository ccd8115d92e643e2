"""Small recipes, data and trainers for the tests of training and evaluation."""

import contextlib
import io
import json
import random
from pathlib import Path

import pytest
import yaml

WORDS = ["the", "a", "cat", "dog", "tree", "river", "stone", "walks", "sees", "finds", "over", "red", "small", "and"]
BASE = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-3,
    "max_length": 48,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 0,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "activation": "crrelu",
    "calibration": "none",
}
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear", "learning_rate": 1e-2}
# Each trainer, and whole models and adapters, once; the other two pairs are slow tests.
trainers_and_methods = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("sft", {}, id="sft-full"),
        pytest.param("dpo", LORA, id="dpo-lora"),
        pytest.param("sft", LORA, id="sft-lora", marks=pytest.mark.slow),
        pytest.param("dpo", {}, id="dpo-full", marks=pytest.mark.slow),
    ],
)


def sentence(generator, words):
    """A line of `words` random words."""
    return " ".join(generator.choice(WORDS) for _ in range(words))


def sft_rows(count=16, seed=0, words=None):
    """Documents of 4 to 10 words, or of `words` words each."""
    generator = random.Random(seed)
    return [{"text": sentence(generator, words or generator.randint(4, 10))} for _ in range(count)]


def dpo_rows(count=16, seed=0):
    """Preference pairs, the chosen answer longer in about half of them."""
    generator = random.Random(seed)
    return [
        {
            "prompt": sentence(generator, 3),
            "chosen": " " + sentence(generator, generator.randint(2, 6)),
            "rejected": " " + sentence(generator, generator.randint(2, 6)),
        }
        for _ in range(count)
    ]


def kto_rows(count=16, seed=0):
    """Answers, every other one desirable."""
    generator = random.Random(seed)
    return [
        {
            "prompt": sentence(generator, 3),
            "completion": " " + sentence(generator, generator.randint(2, 6)),
            "label": i % 2 == 0,
        }
        for i in range(count)
    ]


def prompt_rows(count=16, seed=0):
    """Prompts, with a column that reward functions may use."""
    generator = random.Random(seed)
    return [{"prompt": sentence(generator, 3), "wanted": generator.choice(WORDS)} for _ in range(count)]


ROWS = {
    "sft": sft_rows, "dpo": dpo_rows, "kto": kto_rows, "reward": dpo_rows, "grpo": prompt_rows, "rloo": prompt_rows,
}  # fmt: skip
# Options that a kind of trainer cannot do without.
_SAMPLED = {"max_completion_length": 6, "num_generations": 2}
_SAMPLED["reward_funcs"] = ["rewards.py:length"]
OWN = {"kto": {"learning_rate": 1e-4}, "grpo": _SAMPLED | {"beta": 0.1}, "rloo": _SAMPLED}
REWARDS = """
def length(completions, **kwargs):
    return [float(len(text)) / 10 for text in completions]

async def asks(completions, **kwargs):
    from beside import weight

    return [weight * len(text) for text in completions]

async def asks_in_vain(completions, **kwargs):
    raise KeyError("answer")

def fails(completions, **kwargs):
    raise KeyError("answer")

def not_a_number(completions, **kwargs):
    return [float("nan") for _ in completions]

def too_few(completions, **kwargs):
    return [1.0]

def nothing(completions, **kwargs):
    return None
"""


def write_rows(path, rows):
    """Writes rows as JSON lines; returns the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_recipe(path, values):
    """Writes a recipe; returns the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


class Workshop:
    """A folder with train and test data of both kinds, in which recipes of one model are run."""

    def __init__(self, folder, model):
        self.folder, self.model = Path(folder), str(model)

    def data(self, kind, **splits):
        """The folder of a data set: `train` and `test`, as `save_to_disk` writes it, which is read in no time.

        Where other rows are given, JSON lines.
        """
        rows = {"train": ROWS[kind](seed=1), "test": ROWS[kind](8, seed=2)}
        folder = self.folder / f"{kind}-{len(list(self.folder.iterdir()))}" if splits else self.folder / kind
        if splits:
            for name, content in (rows | splits).items():
                write_rows(folder / f"{name}.jsonl", content)
        elif not folder.exists():
            import datasets

            sets = {name: datasets.Dataset.from_list(content) for name, content in rows.items()}
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                datasets.DatasetDict(sets).save_to_disk(folder)
        return str(folder)

    def values(self, kind, name, **options):
        """A whole recipe, as a dictionary; its output goes to the folder `name`."""
        where = {"model_name_or_path": self.model, "output_dir": str(self.folder / name)}
        values = BASE | OWN.get(kind, {}) | where | options
        values.setdefault("dataset_name", self.data(kind))
        if values.get("reward_funcs"):
            (self.folder / "rewards.py").write_text(REWARDS)
            (self.folder / "beside.py").write_text("weight = 0.25")
            names = values["reward_funcs"]
            values["reward_funcs"] = [
                str(self.folder / name) if name.startswith("rewards.py:") else name for name in names
            ]
        if kind in ("grpo", "rloo"):
            values.pop("max_length", None)
        return values

    def argv(self, kind, name, **options):
        """The command line of a recipe, which is written beside its output."""
        return ["--config", write_recipe(self.folder / f"{name}.yaml", self.values(kind, name, **options))]

    def run(self, kind, name, **options):
        """What run.json says after a run in this process."""
        from crrelu_llm.training.run import run_recipe

        return run_recipe(kind, self.argv(kind, name, **options))

    def trainer(self, kind, name, **options):
        """A recipe and its trainer, ready to train; with evaluation data."""
        from crrelu_llm.training.arguments import parse
        from crrelu_llm.training.prepare import datasets_of, starting_checkpoint
        from crrelu_llm.training.trainers import build_trainer

        recipe = parse(kind, self.argv(kind, name, **options))
        train, test = datasets_of(recipe, always_test=True)
        model = starting_checkpoint(
            recipe.model.model_name_or_path, recipe.activation.patch_config(), self.folder / name / "patched"
        )
        return recipe, build_trainer(recipe, model, train, test)


def losses(record):
    """The training losses of a run, step by step."""
    return [entry["loss"] for entry in record["history"] if "loss" in entry]
