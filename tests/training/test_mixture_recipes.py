"""One activation a layer in a recipe: a mapping of layers to names; what is trained, and an arm of a comparison."""

import pytest
from runs import LORA
from safetensors.torch import load_file

from crrelu_llm.comparison.arms import parse_arm
from crrelu_llm.errors import InputError
from crrelu_llm.evaluation.sparsity import sparsity_of_trainer
from crrelu_llm.training.arguments import parse
from crrelu_llm.training.run import run_recipe, train_and_save

MIXED = {"activation": {0: "relu", "1-": "crrelu"}}


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_the_layers_with_crrelu_learn_epsilon(workshop, tiny_llama_checkpoint, options):
    workshop.model = str(tiny_llama_checkpoint)
    recipe, trainer = workshop.trainer("sft", "run", **MIXED, **options, recompute_activation=True, activation_l1=0.1)
    assert recipe.activation.activation == recipe.values["activation"] == "0=relu,1-=crrelu"
    record = train_and_save(trainer, recipe)
    assert list(record["epsilon"]) == ["model.layers.1.mlp.act_fn"]
    assert record["epsilon"] != record["epsilon_start"] and record["history"][0]["activation_l1"] > 0
    zeros = list(sparsity_of_trainer(trainer).zeros.values())
    assert zeros[0] > 0.2 and zeros[1] < 0.01
    name = "adapter_model.safetensors" if options else "model.safetensors"
    saved = load_file(workshop.folder / "run" / name)
    assert sum(name.endswith(".epsilon") for name in saved) == 1


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ({"0-1": "relu", "1-": "crrelu"}, "layer 1 has two, by 0-1 and by 1-"),
        ({"0-1": ["relu"]}, "unknown activation \"['relu']\""),
        ({"first": "relu"}, "write layers and their activations as 0-5=relu,6-=crrelu"),
        (["relu", "crrelu"], "activation must be a single value"),
    ],
)
def test_mistakes_name_the_recipe(workshop, activation, message):
    argv = workshop.argv("sft", "run", activation=activation)
    with pytest.raises(InputError) as caught:
        run_recipe("sft", argv)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(argv[1]) and not (workshop.folder / "run").exists()


def test_an_arm(workshop):
    arm = parse_arm("0=relu,1-=crrelu:calibration=none")
    assert arm.activation == "0=relu,1-=crrelu" and arm.options == (("calibration", "none"),)
    recipe = parse("sft", [*workshop.argv("sft", "run"), *arm.argv])
    assert recipe.activation.patch_config().by_layer(3) == {0: "relu", 1: "crrelu", 2: "crrelu"}
    with pytest.raises(InputError, match="arm '0=relu,0=crrelu': activation: layer 0 has two"):
        parse_arm("0=relu,0=crrelu")
