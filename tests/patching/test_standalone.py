"""Checkpoints that load without this package: in processes that cannot import it."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import logits, tiny_lfm2, tiny_model, token_ids
from transformers import AutoModel, AutoModelForCausalLM

import crrelu_llm
from crrelu_llm import patch
from crrelu_llm.cli.main import main
from crrelu_llm.errors import InputError
from crrelu_llm.kernels.choice import using
from crrelu_llm.patching import standalone
from crrelu_llm.patching.standalone import FILE, write_standalone

# A process without the package: what it gets from the checkpoints in its folder.
_SCRIPT = """
import json, shutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "crrelu_llm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

def loaded(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()

def refused(directory):
    try:
        AutoModelForCausalLM.from_pretrained(directory)
    except KeyError as error:
        return str(error)

names, limits = sys.argv[1:], torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -300.0])
ids = torch.load("ids.pt")
for name in names:
    found = {"without_trust": [refused(name)]}
    model = loaded(name)
    base = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    model.save_pretrained(f"{name}-again")
    with torch.no_grad():
        found["logits"] = model(input_ids=ids).logits
        found["logits_again"] = loaded(f"{name}-again")(input_ids=ids).logits
        found["hidden"] = base(input_ids=ids).last_hidden_state
        found["tokens"] = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        module = next(module for module in model.modules() if type(module).__name__ == "CRReLU")
        found["limits"] = module(limits[:, None].expand(-1, module.num_channels))
    state = loaded(name, dtype=torch.bfloat16).state_dict()
    found["float32"] = {key for key, value in state.items() if value.dtype == torch.float32}
    shutil.copytree(name, f"{name}-lacking")
    file = f"{name}-lacking/model.safetensors"
    missing = [key for key in load_file(file) if key in found["float32"] and ".1." in key]
    save_file({key: value for key, value in load_file(file).items() if key not in missing}, file, {"format": "pt"})
    state = loaded(f"{name}-lacking").state_dict()
    found["start"] = {key.rpartition(".")[2]: state[key].unique().tolist() for key in missing}
    found["without_trust"].append(refused(name))
    torch.save(found, f"{name}.pt")
"""
_START = {"scale": [1.0], "shift": [0.0], "gain": [1.0], "offset": [0.0], "center": [0.0], "width": [1.0]}
FAMILIES = {
    "llama": {"epsilon_per": "channel", "calibration": "fit", "epsilon_init": 0.25},
    "gpt2": {"density": "fitted", "calibration": "fit", "epsilon_init": 0.25},
    "gemma3_text": {"calibration": "none", "epsilon_init": 0.25},
    "mixtral": {"epsilon_per": "channel", "calibration": "none", "epsilon_init": 0.25},
}
families = pytest.mark.parametrize(
    "family", ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3_text", "mixtral"))]
)


class World:
    """A folder of standalone checkpoints, and what a process without the package got from each."""

    def __init__(self, folder):
        self.folder = folder
        self.models, self.found = {}, {}

    def make(self, families):
        """Patches tiny models, saves them and starts the process."""
        for family in families:
            model = self.models[family] = tiny_model(family)
            patch(model, "crrelu", blocks=token_ids(8, 64), **FAMILIES[family])
            model.save_pretrained(self.folder / family)
            write_standalone(self.folder / family)
        torch.save(token_ids(), self.folder / "ids.pt")
        environment = {"HF_HOME": str(self.folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _SCRIPT, *families]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.found |= {family: torch.load(self.folder / f"{family}.pt", weights_only=False) for family in families}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The two families of the fast tests."""
    made = World(tmp_path_factory.mktemp("standalone"))
    made.make(["llama", "gpt2"])
    return made


@families
def test_without_the_package_it_computes_what_it_computes_with_it(world, family):
    if family not in world.models:
        world.make([family])
    model, found = world.models[family], world.found[family]
    with using("reference"):
        expected = logits(model)
    # For the fitted density the package computes the bump in another order; loaded experts lie elsewhere in memory.
    tolerance = 1e-5 if family in ("gpt2", "mixtral") else 0
    torch.testing.assert_close(found["logits"], expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(found["logits"], logits(model), rtol=0, atol=1e-4)
    assert torch.equal(found["logits_again"], found["logits"])
    with torch.no_grad():
        hidden = model.base_model(input_ids=token_ids()).last_hidden_state
    torch.testing.assert_close(found["hidden"], hidden, rtol=0, atol=1e-4)
    assert torch.equal(found["tokens"], model.generate(token_ids()[:1], max_new_tokens=5, do_sample=False))
    numbers = {name for name in model.state_dict() if name.split(".")[-1] in {"epsilon", *_START}}
    assert found["float32"] == numbers
    assert found["start"] == {"epsilon": [0.25]} | {name: _START[name] for name in found["start"] if name in _START}
    # Without trust_remote_code it fails, also after the file was read: it leaves no name that transformers would take.
    assert found["without_trust"] == ["'crrelu'", "'crrelu'"]


def test_the_formula_at_its_limits(world):
    module = world.models["llama"].model.layers[0].mlp.act_fn
    limits = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -300.0])
    expected = module(limits[:, None].expand(-1, module.num_channels)).detach()
    torch.testing.assert_close(world.found["llama"]["limits"], expected, equal_nan=True)


def test_with_the_package_plain_loading_is_what_it_was(world, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(world.folder / "llama")
    assert type(plain).__module__.startswith("transformers.")
    assert torch.equal(logits(plain), logits(world.models["llama"]))
    plain.save_pretrained(tmp_path / "again")  # as a training does: it stays standalone
    assert (tmp_path / "again" / FILE).read_text() == (world.folder / "llama" / FILE).read_text()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["CRReLUForCausalLM"] and standalone.is_standalone(config)


def test_the_package_is_preferred_where_it_is_there(world):
    for auto_class, name in ((AutoModelForCausalLM, "CRReLUForCausalLM"), (AutoModel, "CRReLUModel")):
        model = auto_class.from_pretrained(world.folder / "llama", trust_remote_code=True).eval()
        assert type(model).__name__ == name
        found = [module for path, module in model.named_modules() if path.endswith("mlp.act_fn")]
        assert len(found) == 2 and all(type(module) is crrelu_llm.CRReLU for module in found)
        if auto_class is AutoModelForCausalLM:
            assert torch.equal(logits(model), logits(world.models["llama"]))


class TestRefusals:
    """What cannot be standalone says why in one line, and nothing is written."""

    def refused(self, directory, words):
        """Asserts that a checkpoint is refused with these words, and stays as it was."""
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        with pytest.raises(InputError, match=words) as caught:
            write_standalone(directory)
        assert "\n" not in str(caught.value)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before

    def test_a_family_that_computes_inside_a_method(self, tmp_path):
        model = tiny_lfm2()
        patch(model, calibration="none")
        model.save_pretrained(tmp_path)
        self.refused(tmp_path, "inside a method")

    def test_a_model_that_is_not_patched(self, tmp_path):
        tiny_model("llama").save_pretrained(tmp_path)
        self.refused(tmp_path, "not patched")

    def test_another_activation(self, tmp_path):
        model = tiny_model("llama")
        patch(model, "gelu", blocks=token_ids(8, 64))
        model.save_pretrained(tmp_path)
        self.refused(tmp_path, "only crrelu can be; elsewhere gelu would silently")

    def test_a_family_whose_config_does_not_name_the_activation(self, tmp_path):
        model = tiny_model("llama")
        patch(model, calibration="none")
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["crrelu"]["config_keys"] = {}
        (tmp_path / "config.json").write_text(json.dumps(config))
        self.refused(tmp_path, "no key of llama's config names")

    def test_code_of_its_own(self, tmp_path):
        model = tiny_model("llama")
        patch(model, calibration="none")
        model.config.auto_map = {"AutoModelForCausalLM": "modeling_other.Other"}
        model.save_pretrained(tmp_path)
        self.refused(tmp_path, "code of its own")

    def test_an_adapter(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        self.refused(tmp_path, "an adapter")


class TestCommand:
    """`crrelu patch --standalone`, and the README that every patched checkpoint has."""

    def patched(self, model, output, *options):
        """Runs the command without calibration; its exit status."""
        argv = ["patch", str(model), "--output_dir", str(output), "--calibration", "none", "--perplexity_data", "none"]
        return main([*argv, *options])

    def test_it_writes_the_file_and_says_so(self, tiny_llama_checkpoint, tmp_path):
        assert self.patched(tiny_llama_checkpoint, tmp_path / "alone", "--standalone") == 0
        readme = (tmp_path / "alone" / "README.md").read_text()
        assert "trust_remote_code=True" in readme and '"alone"' in readme
        assert "import LlamaForCausalLM as CausalLM" in (tmp_path / "alone" / FILE).read_text()
        assert standalone.is_standalone(json.loads((tmp_path / "alone" / "config.json").read_text()))
        assert main(["card", str(tmp_path / "alone")]) == 0
        assert "trust_remote_code=True" in (tmp_path / "alone" / "README.md").read_text()

    def test_a_refusal_comes_before_the_work(self, tiny_llama_checkpoint, tmp_path, capsys):
        code = self.patched(tiny_llama_checkpoint, tmp_path / "alone", "--standalone", "--activation", "gelu")
        assert code == 2 and not (tmp_path / "alone").exists()
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("crrelu patch: ")

    def test_the_readme_of_a_plain_patch_keeps_the_metadata(self, tiny_llama_checkpoint, tmp_path):
        header = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n"
        copy = tmp_path / "source"
        copy.mkdir()
        for path in tiny_llama_checkpoint.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / "README.md").write_text(header + "# Its own text\n")
        assert self.patched(copy, tmp_path / "plain") == 0
        text = (tmp_path / "plain" / "README.md").read_text()
        assert text.startswith(header) and "Its own text" not in text
        assert len([line for line in text.splitlines() if line.startswith("- ")][1:]) == 3  # one is of the header
        assert "import crrelu_llm" in text and "trust_remote_code" not in text and "--model-impl transformers" in text
        assert main(["card", str(tmp_path / "plain")]) == 0  # it may replace this README, nobody has written it
        assert "## The layers" in (tmp_path / "plain" / "README.md").read_text()
        assert main(["card", str(tmp_path / "plain")]) == 2
