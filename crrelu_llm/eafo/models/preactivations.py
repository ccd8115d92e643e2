"""The pre-activations of each site of a model on text: moments, also per channel, and a uniform random sample."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crrelu_llm.activation import Calibrated
from crrelu_llm.eafo.density import Array
from crrelu_llm.eafo.estimates import MIN_SAMPLES
from crrelu_llm.errors import InputError
from crrelu_llm.patching import loading
from crrelu_llm.patching.calibration.pixels import calibration_pixels
from crrelu_llm.patching.calibration.taps import tapped
from crrelu_llm.patching.calibration.tokens import calibration_blocks
from crrelu_llm.patching.calibration.walk import computing_device
from crrelu_llm.patching.feeding import batch_size, run_on
from crrelu_llm.patching.finite import evaluating
from crrelu_llm.patching.modules.hidden import conceal, expose
from crrelu_llm.patching.sites import Site, find_sites


@dataclass(frozen=True)
class Preactivations:
    """The pre-activations of one site, all channels together.

    Attributes:
        path, original: The site's module path, and the name of the activation there.
        count: The number of values: tokens × channels.
        mean, std, skewness, kurtosis: Moments of all values; kurtosis is the excess over a normal's 3.
        channel_means, channel_stds: Moments of each channel, `(channels,)`, float64.
        samples: A uniform random sample without replacement, float64.
    """

    path: str
    original: str
    count: int
    mean: float
    std: float
    skewness: float
    kurtosis: float
    channel_means: Array
    channel_stds: Array
    samples: Array


def load(model: str, data: str, tokens: int, images: int = 256, **options: Any) -> tuple[Any, Tensor]:
    """A MODEL in float32, and its input: token ids, `(blocks, tokens)`, int64, or pixels for an image model.

    Args:
        model: Hub name, directory, `.gguf` file or `builtin:nano`.
        data: `builtin:` data, a local file, or a hub name.
        tokens: How many tokens to read.
        images: How many images to use for an image model.
        **options: For transformers' `from_pretrained`: `trust_remote_code`.

    Raises:
        InputError: The model or text cannot be read, or there is too little text.
    """
    config = loading.load_config(model, **options)
    if loading.head_of(config) == loading.IMAGE_CLASSIFIER:
        blocks = calibration_pixels(data, loading.load_processor(model, **options), images, config)
    else:
        blocks = calibration_blocks(data, loading.load_tokenizer(model, **options), tokens, config)
    return loading.load_model(model, **options), blocks


def amount(blocks: Tensor) -> dict[str, int]:
    """The amount of input: `{tokens}`, or `{images}`."""
    return {"images": len(blocks)} if blocks.is_floating_point() else {"tokens": blocks.numel()}


def amount_of(document: dict[str, Any]) -> str:
    """The amount of input of a document, in words."""
    return next(f"{document[name]} {name}" for name in ("tokens", "images") if name in document)


def untrained(model: Any, seed: int = 0) -> Any:
    """A model of the same class and config with its family's initial weights, drawn with `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)(model.config).eval()


def measure(
    model: Any, blocks: Tensor, samples: int = 20_000, seed: int = 0, description: str = "Pre-activations"
) -> list[Preactivations]:
    """Runs a model over text once, and returns the pre-activations of its sites.

    Beside the model, this needs memory for one batch of a site in float64 and for `samples` numbers per site.

    Args:
        model: A causal LM, or an image model; it is not changed.
        blocks: Token ids, `(blocks, tokens)`, int64, or the pixels of images.
        samples: How many pre-activations of each site to keep.
        seed: The seed of the sampling.
        description: The text of the progress bar.

    Returns:
        One entry per site that a token reaches, in the model's order.

    Raises:
        InputError: The model has no sites, or a calibrated activation other than CRReLU; or a site's pre-activations
            are not finite, all the same, or too few.
    """
    from tqdm.auto import tqdm

    if samples < MIN_SAMPLES:
        raise InputError(f"samples: {samples} per site are too few for a density; take at least {MIN_SAMPLES}")
    if any(isinstance(module, Calibrated) for module in model.modules()):
        raise InputError(
            "the model has a calibrated activation, whose input is not the pre-activation; measure the original "
            "checkpoint, or one patched to crrelu or with calibration: none"
        )
    sites = find_sites(model)
    hidden = [site.path for site in sites if site.kind == "functional"]
    expose(model, hidden)
    seen = {site.path: _Seen(samples, [seed, index]) for index, site in enumerate(sites)}
    device, home = computing_device(model), next(model.parameters()).device
    try:
        if device != home:
            model.to(device)
        with evaluating(model), torch.no_grad(), tapped(model, sites, lambda path, x, *_: seen[path].add(x)):
            for batch in tqdm(blocks.split(batch_size(blocks)), desc=description, unit="batch", disable=None):
                run_on(model, batch.to(device), head=False)
    finally:
        if device != home:
            model.to(home)
        conceal(model, hidden)
    return [seen[site.path].result(site) for site in sites if seen[site.path].count]


class _Seen:
    """Power sums of each channel, and a reservoir sample.

    The sums are of (x − a)/b, where a and b are the mean and deviation of the first batch: raw fourth powers would
    cancel.
    """

    def __init__(self, size: int, seed: list[int]) -> None:
        self.reservoir, self.count = _Reservoir(size, seed), 0
        self.shift, self.scale, self.rows = 0.0, 1.0, 0
        self.sums: Array | None = None

    def add(self, x: Tensor) -> None:
        if not x.numel():
            return
        wide = x.detach().reshape(-1, x.shape[-1]).double()
        if self.sums is None:
            self.shift, self.scale = float(wide.mean()), float(wide.std(correction=0)) or 1.0
            self.sums = np.zeros((4, wide.shape[1]))
        self.reservoir.add(wide.reshape(-1))
        wide = (wide - self.shift) / self.scale
        power = torch.ones_like(wide)
        for row in self.sums:
            power *= wide
            row += power.sum(0).cpu().numpy()
        self.count += wide.numel()
        self.rows += wide.shape[0]

    def result(self, site: Site) -> Preactivations:
        assert self.sums is not None
        channels = self.sums / self.rows
        first, second, third, fourth = channels.mean(axis=1).tolist()
        variance = second - first**2
        if not np.isfinite([first, second, third, fourth]).all():
            raise InputError(f"{site.path}: its pre-activations on this text are not finite; use other text or model")
        if self.count < MIN_SAMPLES:
            raise InputError(f"{site.path}: {self.count} pre-activations are too few for a density; give more tokens")
        # For a constant, the difference of the moments is rounding error.
        if variance <= 1e-12 * (1 + first**2) or float(np.ptp(self.reservoir.values)) == 0:
            value = self.shift + self.scale * first
            raise InputError(
                f"{site.path}: all its pre-activations on this text are {value:g} (standard deviation 0): there is no "
                "density to measure; take another model"
            )
        return Preactivations(
            site.path,
            site.original,
            self.count,
            self.shift + self.scale * first,
            self.scale * variance**0.5,
            (third - 3 * first * second + 2 * first**3) / variance**1.5,
            (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / variance**2 - 3,
            self.shift + self.scale * channels[0],
            self.scale * np.sqrt(np.maximum(channels[1] - channels[0] ** 2, 0)),
            self.reservoir.values,
        )


class _Reservoir:
    """A uniform sample without replacement from a stream: the values with the smallest random keys.

    From a batch, only values with keys below the largest kept key are drawn.
    """

    def __init__(self, size: int, seed: list[int]) -> None:
        self.size, self.random = size, np.random.default_rng(seed)
        self.values, self.keys = np.empty(0), np.empty(0)

    def add(self, values: Tensor) -> None:
        """Offers numbers, `(n,)`, float64."""
        total = values.numel()
        bar = float(self.keys.max()) if self.keys.size == self.size else 1.0
        count = int(self.random.binomial(total, bar))
        every = bar == 1.0
        place = np.arange(total) if every else self.random.choice(total, count, replace=False, shuffle=False)
        keys = np.concatenate([self.keys, self.random.uniform(0, bar, place.size)])
        drawn = values[torch.as_tensor(place, device=values.device)].cpu().numpy()
        found = np.concatenate([self.values, drawn])
        if keys.size > self.size:
            kept = np.argpartition(keys, self.size - 1)[: self.size]
            keys, found = keys[kept], found[kept]
        self.values, self.keys = found, keys
