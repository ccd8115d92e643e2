"""The options of a patch: an impossible one is refused in one line that names it."""

import pytest

from crrelu_llm import PatchConfig
from crrelu_llm.errors import InputError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "crelu"}, ["'crelu'", "crrelu", "gelu_new"]),
        ({"epsilon_per": "neuron"}, ["epsilon_per", '"layer" or "channel"', '"neuron"']),
        ({"calibration": "refits"}, ["calibration", '"none", "fit" or "refit"', '"refits"']),
        ({"calibration_tokens": 0}, ["calibration_tokens", "0"]),
        ({"epsilon_init": float("nan")}, ["epsilon_init", "nan"]),
        ({"epsilon_init": float("inf")}, ["epsilon_init", "inf"]),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(InputError) as caught:
        PatchConfig(**options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)
