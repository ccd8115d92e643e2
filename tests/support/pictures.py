"""Tiny image models and data for tests: 8×8 pictures of three kinds that can be told apart."""

import numpy as np
import torch
from PIL import Image

NAMES = ("bright", "dark", "striped")
VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "image_size": 8, "patch_size": 4,
}  # fmt: skip


def picture(label, seed, size=8, mode="RGB"):
    """A picture of a kind, with noise of its own."""
    random = np.random.default_rng(seed)
    grey = {"bright": 200, "dark": 60}.get(label)
    pixels = np.full((size, size), 130 if grey is None else grey)
    if grey is None:
        pixels[::2] += 90
    noisy = np.clip(pixels[..., None] + random.integers(-40, 40, (size, size, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def folder(path, train=24, test=9, size=8):
    """An image folder: `path/train/<label>/<n>.png` and `path/test/…`; returns it as a string."""
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            label = NAMES[number % len(NAMES)]
            file = path / split / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(label, 1000 * (split == "test") + number, size).save(file)
    return str(path)


def vit(seed=0, labels=NAMES, **sizes):
    """A tiny ViT with a head, its weights large enough for an activation to matter."""
    from transformers import AutoModelForImageClassification, ViTConfig

    names = dict(enumerate(labels))
    values = {key: value for key, value in (VIT | sizes).items() if key != "model_type"}
    config = ViTConfig(**values, id2label=names, label2id={name: number for number, name in names.items()})
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(8)
    return model


def save(model, path, size=8):
    """Saves a model with its image processor; returns the path as a string."""
    from transformers import ViTImageProcessorPil

    model.save_pretrained(path)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(path)
    return str(path)


def pixels(count=2, size=8, seed=1):
    """Random pixels, `(count, 3, size, size)`."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def logits(model, batch=None):
    """The model's logits of random pixels, without gradients."""
    with torch.no_grad():
        return model(pixel_values=pixels() if batch is None else batch).logits
