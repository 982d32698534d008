"""The family that docs/conversion.md adds as an example is converted and compared like the others."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.hf_models import HF_MODELS
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_brain.conversion import registry
from megatron_brain.conversion.family import MLP, Weight, replaced
from megatron_brain.conversion.fusion import GATE_UP
from megatron_brain.conversion.llama_like import LAYER

PAGE = Path(__file__).parents[3] / "docs" / "conversion.md"


class ToyConfig(LlamaConfig):
    model_type = "toy"
    attribute_map = {"num_hidden_layers": "depth"}


class ToyForCausalLM(LlamaForCausalLM):
    """transformers' Llama with other names of two modules."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        rename(self.model, "norm", "last_norm")
        for layer in self.model.layers:
            rename(layer.mlp, "down_proj", "back_proj")


def rename(module, old, new):
    """Give a submodule another name; the code of its module still finds it by the old one."""
    setattr(module, new, module._modules.pop(old))
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {old: property(lambda self: getattr(self, new))})


@pytest.fixture
def family(monkeypatch):
    """The example of the page, registered; transformers knows its classes."""
    section = PAGE.read_text(encoding="utf-8").split("## Adding a family")[1].split("\n## ")[0]
    [example] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    defined = {}
    exec(compile(example, str(PAGE), "exec"), defined)
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, defined["FAMILY"]))
    AutoConfig.register("toy", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
    sizes = {**HF_MODELS["llama"], "model_type": "toy", "depth": 3}
    del sizes["num_hidden_layers"]
    monkeypatch.setitem(HF_MODELS, "toy", sizes)
    return defined["FAMILY"]


def test_the_example_goes_through_a_checkpoint_bit_equal_and_computes_what_transformers_does(
    family, write_hf, tool, tmp_path, capsys
):
    source, checkpoint, out = write_hf(model="toy"), tmp_path / "checkpoint", tmp_path / "out"
    assert tool("convert_hf_to_megatron").main(["--hf-model", str(source), "--save", str(checkpoint)]) == 0
    assert tool("convert_megatron_to_hf").main(["--load", str(checkpoint), "--save", str(out)]) == 0
    assert capsys.readouterr().out.count("largest difference of the logits") == 2
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert {"model.last_norm.weight", "model.layers.2.mlp.back_proj.weight"} <= before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["depth"], "num_hidden_layers" in config) == ("toy", 3, False)


def test_a_wrong_row_of_a_new_familys_table_is_found_in_its_first_layer(
    family, write_hf, tool, tmp_path, monkeypatch, capsys
):
    row = next(weight for weight in LAYER if weight.name == MLP + "linear_fc1.weight")
    swapped = dataclasses.replace(
        family, layer=replaced(family.layer, Weight(row.name, row.sources[::-1], fusion=GATE_UP))
    )
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES[:-1], swapped))
    save = tmp_path / "checkpoint"
    assert tool("convert_hf_to_megatron").main(["--hf-model", str(write_hf(model="toy")), "--save", str(save)]) == 1
    assert "layer 0 is the first after which hidden states differ" in capsys.readouterr().err
