"""Objects remember the arguments that they were made with, and are otherwise as if they did not."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from ldm import config as configuration
from ldm.arguments import arguments_of, recorded, remembers_arguments
from ldm.config.signatures import parameters
from ldm.diffusion.schedule import DiscreteSchedule
from ldm.models.encoder_unet import SuperResModel
from ldm.models.unet import UNetModel

SMALL = {
    "in_channels": 3, "out_channels": 3, "model_channels": 8, "num_res_blocks": 1, "channel_mult": (1, 2),
    "attention_resolutions": [2], "num_heads": 1, "num_groups": 4,
}  # fmt: skip


@remembers_arguments
class Layer(nn.Module):
    """A layer with every kind of parameter."""

    def __init__(self, width: int, *, sizes: dict, bias: bool = True, **more: float):
        super().__init__()
        sizes.pop("gone", None)
        self.linear = nn.Linear(width, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Undecorated(Layer):
    pass


class Plain(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)


def make_layer(width: int) -> Layer:
    return Layer(width, sizes={})


def make_plain(width: int) -> Plain:
    return Plain(width)


def test_arguments_are_kept_by_name_as_they_were_given():
    sizes = {"gone": 1, "kept": [2, 3]}
    layer = Layer(4, sizes=sizes, gain=0.5)
    sizes["kept"].append(4)
    path = f"{__name__}.Layer"
    assert recorded(layer) == (path, {"width": 4, "sizes": {"gone": 1, "kept": [2, 3]}, "gain": 0.5})
    assert arguments_of(layer)["bias"] is True


def test_a_decorated_subclass_keeps_its_own_and_an_undecorated_one_nothing():
    model = SuperResModel(**SMALL)
    assert recorded(model) == ("ldm.models.encoder_unet.SuperResModel", SMALL)
    assert recorded(Undecorated(4, sizes={})) is None
    with pytest.raises(ValueError, match="Plain does not remember"):
        arguments_of(Plain(1))


def test_a_failed_call_says_what_it_would_have_said():
    with pytest.raises(TypeError, match=r"__init__\(\) missing 1 required keyword-only argument: 'sizes'"):
        Layer(4)


def test_signatures_stay():
    assert list(inspect.signature(Layer).parameters) == ["width", "sizes", "bias", "more"]
    assert inspect.signature(DiscreteSchedule, eval_str=True).parameters["timesteps"].annotation is int
    assert parameters(UNetModel)["num_groups"].default == 32
    assert "channels of `x`" not in (UNetModel.__init__.__doc__ or "")


def test_copies_and_pickles_have_the_same_parameters_and_arguments():
    model = UNetModel(**SMALL)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert recorded(again) == recorded(model)
        assert again.state_dict().keys() == model.state_dict().keys()
    assert recorded(copy.copy(model)) == recorded(model)


def test_nothing_is_drawn_or_registered():
    torch.manual_seed(0)
    Layer(4, sizes={})
    after = torch.rand(1)
    torch.manual_seed(0)
    nn.Linear(4, 4)
    assert torch.equal(after, torch.rand(1))
    assert [name for name, _ in Layer(4, sizes={}).named_parameters()] == ["linear.weight", "linear.bias"]
    assert list(dict(Layer(4, sizes={}).named_modules())) == ["", "linear"]


def test_a_compiled_layer_has_no_graph_breaks():
    layer = Layer(4, sizes={})
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.ones(2, 4)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    "target, expected",
    [
        ("Plain", ("Plain", {"width": 4})),
        ("make_plain", ("make_plain", {"width": 4})),  # by a function: that is how it is made again
        ("make_layer", ("Layer", {"width": 4, "sizes": {}})),  # which knows more of itself
    ],
)
def test_what_a_config_makes_remembers_its_target_and_params(target, expected):
    made = configuration.instantiate(
        {"target": f"{__name__}.{target}", "params": {"width": 4}}, allow_foreign=True
    )
    assert recorded(made) == (f"{__name__}.{expected[0]}", expected[1])


def test_what_can_hold_no_attribute_stays_without():
    made = configuration.instantiate({"target": "builtins.dict", "params": {"a": 1}}, allow_foreign=True)
    assert made == {"a": 1} and recorded(made) is None
