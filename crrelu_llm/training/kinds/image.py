"""Image classification: transformers' own Trainer, from a config or from a checkpoint."""

import copy
from collections import defaultdict
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from crrelu_llm.data.images import undecoded
from crrelu_llm.errors import InputError, reading
from crrelu_llm.evaluation.classified import evaluate_image, hits, image_texts, logits_of
from crrelu_llm.patching import loading
from crrelu_llm.patching.calibration.pixels import TEXT
from crrelu_llm.training import scratch
from crrelu_llm.training.augmentation import HIGHEST, Augmentation
from crrelu_llm.training.epsilon import EpsilonMixin
from crrelu_llm.training.kinds.kind import Kind
from crrelu_llm.training.pictures import Epochs, Pictures, collate
from crrelu_llm.training.saving import SavingMixin

_CHECKED = 20_000  # images of a split that are opened before training


@dataclass
class ImageConfig(TrainingArguments):
    """transformers' TrainingArguments, with further options for image models.

    `model_config` replaces `model_name_or_path`: the model is then initialised from the config with the seed.
    """

    model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Train from scratch: a config, or the path of one."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained`."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to allow code from the model's repository to run."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace the head of a checkpoint that has other labels."}
    )
    image_column_name: str = field(default="image", metadata={"help": "The column of the data that holds the images."})
    label_column_name: str = field(default="label", metadata={"help": "The column of the data that holds the labels."})
    image_size: int | None = field(
        default=None, metadata={"help": "From scratch: the side length in pixels, if the config does not set it."}
    )
    crop_padding: int = field(
        default=0, metadata={"help": "Pixels of padding around a training image before a crop of its size."}
    )
    crop_scale: float = field(
        default=0.0, metadata={"help": "Least share of a training image's area in a random crop. 0: no crop."}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    randaugment_ops: int = field(default=0, metadata={"help": "Number of RandAugment operations per training image."})
    randaugment_magnitude: float = field(default=9.0, metadata={"help": "Their magnitude, from 0 to 10."})
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mix each training image and its label with another: Beta(alpha, alpha)."}
    )


for _name, _entry in ImageConfig.__dataclass_fields__.items():  # argparse formats the help texts
    if "%" in (_text := _entry.metadata.get("help", "")):
        _own = copy.copy(_entry)
        _own.metadata = {**_entry.metadata, "help": _text.replace("%%", "%").replace("%", "%%")}  # type: ignore
        ImageConfig.__dataclass_fields__[_name] = _own


class Image(SavingMixin, EpsilonMixin, Trainer):
    """transformers' Trainer with a learnable ε, on images.

    Args:
        model: Path or hub name of a checkpoint.
        args: The training arguments.
        train_dataset: The training rows.
        eval_dataset: The evaluation rows, or None.
        activation_args: The activation section.
        data_name: The name of the data, for messages.
        **kwargs: Options of language models; none of them is set.
    """

    def __init__(
        self,
        model: str,
        args: ImageConfig,
        train_dataset: Any,
        eval_dataset: Any,
        activation_args: Any,
        data_name: str,
        **kwargs: Any,
    ):
        set_seed(args.seed)
        given: Any = args.model_init_kwargs
        options = {key: value for key, value in given.items() if value is not None}
        options["dtype"] = getattr(torch, options.get("dtype", "float32"), options.get("dtype"))
        loaded = getattr(transformers, loading.IMAGE_CLASSIFIER).from_pretrained(model, **options)
        processor = loading.load_processor(model, **_of_the_hub(options))
        taken = {key: getattr(args, key) for key in (entry.name for entry in fields(Augmentation))}
        shared = (args, processor, loaded.config, data_name)
        train = Pictures(train_dataset, *shared, augmentation=Augmentation(**taken))
        test = None if eval_dataset is None else Pictures(eval_dataset, *shared)
        self._metrics: Any = {"train": defaultdict(list), "eval": defaultdict(list)}  # as TRL's trainers have them
        self._total_train_tokens = 0
        super().__init__(
            model=loaded,
            args=args,
            train_dataset=train,
            eval_dataset=test,
            processing_class=processor,
            data_collator=collate,
            compute_metrics=_mean_hits,
            preprocess_logits_for_metrics=lambda logits, labels: hits(_first(logits), labels),
            activation_args=activation_args,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a batch's mean
        with reading(f"{data_name}: row 1", "set image_size, or mend the model's preprocessor_config.json"):
            _look(self.model, train[0]["pixel_values"][None])

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Cross-entropy with label numbers or, after mixup, label shares; label smoothing only in training."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss = nn.functional.cross_entropy(logits_of(outputs).float(), labels, label_smoothing=smoothing)
        return (loss, {"loss": loss, "logits": logits_of(outputs)}) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Epochs:
        """Rows in an order determined by the seed and the epoch; the row's number encodes the epoch."""
        shuffles = self.args.train_sampling_strategy != "sequential"
        return Epochs(len(self.train_dataset), self.args.seed, lambda: int(self.state.epoch or 0), shuffles)


def _of_the_hub(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("revision", "trust_remote_code") if options.get(key)}


def _first(logits: Any) -> Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def _mean_hits(prediction: Any) -> dict[str, float]:
    first, five = prediction.predictions.mean(0)
    return {"accuracy": float(first), "top5_accuracy": float(five)}


@torch.no_grad()
def _look(model: Any, pixels: Tensor) -> None:
    """Runs the model on one image: a wrong size of one image is wrong for all."""
    was_training = model.training
    model.eval()
    try:
        model(pixel_values=pixels.to(next(model.parameters()).device, next(model.parameters()).dtype))
    finally:
        model.train(was_training)


def _takes(columns: set[str], args: Any) -> bool:
    wanted = {getattr(args, "image_column_name", "image"), getattr(args, "label_column_name", "label")}
    return wanted <= columns


def _prepare(split: Any, recipe: Any) -> Any:
    if not hasattr(split, "__len__"):
        raise InputError(f"{recipe.source}: images are not read as a stream; leave dataset_streaming out")
    return undecoded(split, recipe.training.image_column_name, str(recipe.script.dataset_name))


def _check_rows(recipe: Any, split: Any, name: str) -> None:
    """Opens the images; of a large split, a sample spread over its rows."""
    from tqdm.auto import tqdm

    from crrelu_llm.data.images import open_image

    count = min(len(split), _CHECKED)
    column = split.select_columns([recipe.training.image_column_name])
    for number in tqdm(range(count), desc=f"Reading {name}", delay=5, leave=False):
        index = number * len(split) // count
        open_image(column[index][recipe.training.image_column_name], 3, f"{name}: row {index + 1}")


def _check(recipe: Any, where: str) -> None:
    training, activation = recipe.training, recipe.activation
    if recipe.model.model_name_or_path and training.model_config is not None:
        raise InputError(f"{where}model_config makes a new model, and model_name_or_path names one; give one of them")
    if recipe.mixture.datasets:
        raise InputError(f"{where}datasets mixes texts; name one data set of images: dataset_name")
    for key in ("use_peft", "load_in_4bit", "load_in_8bit"):
        if getattr(recipe.model, key):
            raise InputError(f"{where}{key} is for language models; crrelu image trains all weights")
    for key in ("crop_padding", "randaugment_ops", "mixup_alpha"):
        if getattr(training, key) < 0:
            raise InputError(f"{where}{key} must be 0 or more, not {getattr(training, key)}")
    if not 0 <= training.crop_scale <= 1:
        raise InputError(f"{where}crop_scale must be a share from 0 to 1, not {training.crop_scale}")
    if not 0 <= training.randaugment_magnitude <= HIGHEST:
        raise InputError(
            f"{where}randaugment_magnitude must be from 0 to {HIGHEST:g}, not {training.randaugment_magnitude}"
        )
    if not 0 <= training.label_smoothing_factor < 1:
        raise InputError(
            f"{where}label_smoothing_factor must be 0 or more and below 1, not {training.label_smoothing_factor}"
        )
    if activation.calibration_data == TEXT:  # not text: the training images
        activation.calibration_data = str(recipe.script.dataset_name)


KIND = Kind(
    name="image",
    label="image classification",
    example="crrelu image --config recipes/paper-vision/small_cifar10.yaml --num_train_epochs 1",
    config=ImageConfig,
    trainer=Image,
    items="images",
    needs="a column of images (image_column_name) and one of labels (label_column_name)",
    takes=_takes,
    parts=lambda recipe, row: [],
    evaluate=evaluate_image,
    texts=image_texts,
    headline="accuracy",
    logged=("eval_accuracy", True),
    auto_class=loading.IMAGE_CLASSIFIER,
    prepare=_prepare,
    check=_check,
    arguments=lambda recipe: {"data_name": str(recipe.script.dataset_name)},
    skeleton=scratch.skeleton,
    check_rows=_check_rows,
    start=scratch.starting_model,
)
