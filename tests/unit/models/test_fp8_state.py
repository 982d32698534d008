"""What FP8 keeps, on layers that only have Transformer Engine's attributes; tests/te has its own layers."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from torch import nn

from megatron_brain.config.fp8 import Fp8Config
from megatron_brain.models.fp8 import state as fp8_state
from megatron_brain.models.offload import HostWeights


class Layer(nn.Linear):
    """With the attributes that ours reads of a linear layer of Transformer Engine's."""

    def __init__(self):
        super().__init__(2, 2, bias=False)
        self._fp8_workspaces = {"weight": torch.zeros(2, 2)}
        self.fp8_meta = {
            key: SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(4, count))
            for key, count in (("scaling_fwd", 3), ("scaling_bwd", 2))
        }

    def init_fp8_metadata(self):
        pass


class Chunk(nn.Module):
    def __init__(self, recipe="delayed", first=7):
        super().__init__()
        self.config = SimpleNamespace(fp8="hybrid", fp8_recipe=Fp8Recipe(recipe), fp8_margin=1)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList()
        for number in (first, first + 1):
            block = nn.Module()
            block.mlp, block.norm, block.layer_number = Layer(), nn.LayerNorm(2), number
            self.decoder.layers.append(block)


def test_scales_have_global_names_and_are_written_through():
    chunk = Chunk()
    found = fp8_state.scales([chunk])
    assert found.keys() == {
        f"decoder.layers.{layer}.mlp.{direction}.{kind}"
        for layer in (6, 7)
        for direction in ("forward", "backward")
        for kind in ("scale", "amax_history")
    }
    found["decoder.layers.7.mlp.backward.scale"].fill_(3.0)
    assert chunk.decoder.layers[1].mlp.fp8_meta["scaling_bwd"].scale.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "custom"])
def test_other_recipes_keep_nothing(single, recipe):
    chunk = Chunk(recipe)
    assert fp8_state.scales([chunk]) == {}
    fp8_state.scale_weights([chunk], single.groups.tp)
    assert chunk.decoder.layers[0].mlp.fp8_meta["scaling_fwd"].scale.tolist() == [1.0] * 3


def test_scales_of_weights_bring_their_largest_magnitude_to_that_of_e4m3_less_the_margin(single):
    chunk = Chunk()
    with torch.no_grad():
        chunk.decoder.layers[0].mlp.weight.copy_(torch.tensor([[0.01, -0.07], [0.0, 0.02]]))
        chunk.decoder.layers[1].mlp.weight.zero_()
    fp8_state.scale_weights([chunk], single.groups.tp)
    first, empty = (block.mlp.fp8_meta["scaling_fwd"] for block in chunk.decoder.layers)
    assert first.scale.tolist() == pytest.approx([1.0, 448 / 0.07 / 2, 1.0])
    assert first.amax_history[:, 1].tolist() == pytest.approx([0, 0, 0, 0.07])
    assert empty.scale.tolist() == [1.0] * 3 and not empty.amax_history.any()


def test_what_a_pass_does_to_preserved_scales_is_undone_also_after_an_error():
    chunk = Chunk()
    found = fp8_state.scales([chunk])
    before = {name: tensor.clone() for name, tensor in found.items()}
    with pytest.raises(ZeroDivisionError), fp8_state.preserved([chunk]):
        for tensor in found.values():
            tensor.add_(1.0)
        raise ZeroDivisionError
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_fp8_is_off_inside_of_the_context_only():
    chunk = Chunk()
    emulating, idle = nn.Module(), nn.Module()
    emulating.emulates_fp8, idle.emulates_fp8 = True, False
    chunk.extend = nn.ModuleList([emulating, idle])
    with pytest.raises(ZeroDivisionError), fp8_state.switched_off([chunk]):
        assert chunk.config.fp8 is None and not emulating.emulates_fp8
        raise ZeroDivisionError
    assert chunk.config.fp8 == "hybrid" and emulating.emulates_fp8 and not idle.emulates_fp8


def test_copies_in_fp8_leave_with_the_weights():
    chunk = Chunk().requires_grad_(False)
    weights = HostWeights([chunk])
    assert not any(block.mlp._fp8_workspaces for block in chunk.decoder.layers)
    with weights.on_device():
        chunk.decoder.layers[0].mlp._fp8_workspaces["weight"] = torch.zeros(1)
    assert not chunk.decoder.layers[0].mlp._fp8_workspaces


def test_models_that_are_not_trained_take_their_scales_from_each_tensor_itself():
    delayed = Fp8Config(fp8_format="e4m3", fp8_recipe="delayed", fp8_margin=2, fp8_amax_history_len=16)
    assert fp8_state.without_history(delayed) == Fp8Config(fp8_format="e4m3", fp8_recipe="tensorwise")
    gathered = Fp8Config(fp8_format="hybrid", fp8_param_gather=True)
    assert fp8_state.without_history(gathered) == Fp8Config(fp8_format="hybrid")
    assert fp8_state.without_history(Fp8Config()) == Fp8Config()
