"""Every key of file and module is accounted for, or the module stays as it was; files are whole or absent."""

import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference_data import ROOT, load_keys
from torch import nn

from ldm.checkpoints.key_report import explanation, group_by_prefix
from ldm.checkpoints.originals.published import ema_names
from ldm.checkpoints.strict import (
    HARMLESS,
    KeyMismatch,
    NonFiniteWeights,
    ignored,
    load_strict,
)
from ldm.weights.errors import CheckpointError
from ldm.weights.reading import read_weights
from ldm.weights.writing import write_safetensors


class Net(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)
        self.other = nn.Linear(4, 2)
        if tied:
            self.other.weight = self.head.weight
        self.register_buffer("steps", torch.arange(3), persistent=False)


def other_weights(**kwargs) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: tensor.clone() for name, tensor in Net(**kwargs).state_dict().items()}


def untouched(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("assign", (False, True))
def test_everything_is_copied(assign):
    net, weights = Net(), other_weights()
    parameters = dict(net.named_parameters())
    load_strict(net, weights, where="a.ckpt", assign=assign)
    assert untouched(net, weights)
    assert all(p.requires_grad for p in net.parameters()) and isinstance(net.head.weight, nn.Parameter)
    assert all((parameters[name] is p) is not assign for name, p in net.named_parameters())
    net.body(torch.randn(2, 3, 5, 5)).sum().backward()
    assert net.body[0].weight.grad is not None


def test_all_differences_are_listed_and_nothing_is_touched():
    net, weights = Net(), other_weights()
    before = snapshot(net)
    del weights["body.0.bias"], weights["head.weight"]
    weights |= {"new.a": torch.ones(1), "new.b": torch.ones(2, 3)}
    weights["other.weight"] = torch.ones(2, 5)
    weights["body.1.num_batches_tracked"] = torch.tensor(0.0)
    with pytest.raises(KeyMismatch) as error:
        load_strict(net, weights, where="a.ckpt")
    assert error.value.missing == {"body.0.bias": (4,), "head.weight": (2, 4)}
    assert error.value.extra == {"new.a": (1,), "new.b": (2, 3)}
    assert error.value.misshaped == {"other.weight": ((2, 5), (2, 4))}
    assert error.value.mistyped == {"body.1.num_batches_tracked": (torch.float32, torch.int64)}
    for part in (
        "a.ckpt",
        "Net",
        "body.0.bias (4,)",
        "new.b (2, 3)",
        "(2, 5) in the file, (2, 4) in the module",
    ):
        assert part in str(error.value)
    assert untouched(net, before)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_single_difference_fails(data):
    net, weights = Net(), other_weights()
    before = snapshot(net)
    name = data.draw(st.sampled_from(sorted(weights)))
    kind = data.draw(st.sampled_from(("missing", "extra", "misshaped")))
    if kind == "misshaped":
        weights[name] = weights[name][None]
    else:
        tensor = weights.pop(name)
        if kind == "extra":
            weights |= {name: tensor, name + "x": tensor}
    with pytest.raises(KeyMismatch) as error:
        load_strict(net, weights, where="a.ckpt", ignore=HARMLESS)
    lists = {part: set(getattr(error.value, part)) for part in ("missing", "extra", "misshaped")}
    assert lists.pop(kind) == {name + "x" if kind == "extra" else name} and not any(lists.values())
    assert untouched(net, before)


def test_ignored_extras_are_only_extras():
    net, weights = Net(), other_weights()
    rules = [r"head\..+|junk"]
    load_strict(net, {**weights, "junk": torch.ones(1)}, ignore=rules, where="a")
    assert untouched(net, weights)  # a rule does not keep a known key from loading
    del weights["head.bias"]
    with pytest.raises(KeyMismatch) as error:  # nor does it make one optional
        load_strict(net, weights, ignore=rules, where="a")
    assert set(error.value.missing) == {"head.bias"}


def test_harmless_extras_of_published_checkpoints():
    extras = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
        log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
        posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar scale_factor
        ddim_sigmas ddim_alphas ddim_alphas_prev ddim_sqrt_one_minus_alphas denoiser.sigmas loss.logvar
        loss.discriminator.main.0.weight loss.perceptual_loss.lin0.model.1.weight model_ema.decay
        model_ema.diffusion_modelout0weight
        cond_stage_model.transformer.text_model.embeddings.position_ids"""
    assert all(map(ignored, extras.split()))
    assert all(HARMLESS.values())
    wanted = [
        *other_weights(),
        "model.diffusion_model.out.0.weight",
        "loss",
        "my_betas",
        "decoder.loss.weight",
    ]
    assert not any(map(ignored, wanted))
    net, weights = Net(), other_weights()
    load_strict(
        net, {**weights, **{name: torch.ones(1) for name in extras.split()}}, ignore=HARMLESS, where="a"
    )
    with pytest.raises(KeyMismatch) as error:
        load_strict(net, {**weights, "betas": torch.ones(1)}, where="a")
    assert set(error.value.extra) == {"betas"}


def test_no_harmless_rule_hides_a_parameter_of_the_reference_networks():
    folders = [path.name for path in ROOT.iterdir() if path.name.startswith(("compvis", "sgm", "adm"))]
    names = [name for folder in folders for name in load_keys(folder)]
    assert len(names) > 1000 and not any(map(ignored, names))


def test_long_lists_are_summed_up_by_prefix():
    net = nn.ModuleDict({f"part{i}": nn.ModuleList(nn.Linear(2, 2) for _ in range(20)) for i in range(3)})
    with pytest.raises(KeyMismatch) as error:
        load_strict(net, {}, where="a")
    text = str(error.value)
    assert len(error.value.missing) == 120 and len(text.splitlines()) < 10
    assert "120 missing" in text and "part1.* (40), such as part1.0.weight (2, 2)" in text


@settings(max_examples=100)
@given(
    st.sets(st.lists(st.sampled_from("abc"), min_size=1, max_size=5).map(".".join), min_size=1, max_size=60)
)
def test_groups_hold_every_name_once(names):
    groups = group_by_prefix(names)
    assert len(groups) <= 12
    assert sorted(name for group in groups.values() for name in group) == sorted(names)


@pytest.mark.parametrize(
    "rename, hint",
    [
        (lambda n: "module." + n, "with a wrapper's 'module.' inside"),
        (lambda n: n.replace(".", "._orig_mod.", 1), "with a wrapper's '_orig_mod.' inside"),
        (
            lambda n: "model.diffusion_model." + n,
            "All 11 missing names are in the file behind 'model.diffusion_model.'",
        ),
        (lambda n: n.replace("other.weight", "othr.weight"), "other.weight may be othr.weight"),
    ],
)
def test_renamed_files_are_explained(rename, hint):
    weights = {rename(name): tensor for name, tensor in other_weights().items()}
    with pytest.raises(KeyMismatch, match=re.escape(hint)):
        load_strict(Net(), weights, where="a")


def test_explanations():
    names = {"a.b", "a.c.d", "e"}
    assert "without their 'model.'" in explanation({"model." + n for n in names}, names)
    assert "2 of 3" in explanation(names, {"x.a.b", "x.a.c.d", "y.e"})
    assert explanation(names, set()) is None and explanation(set(), names) is None
    assert explanation({"conv_in.weight"}, {"lstm"}) is None


def test_types_are_converted_on_purpose():
    net = Net().half()
    weights = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in other_weights().items()
    }
    load_strict(net, weights, where="a")
    assert net.head.weight.dtype is torch.float16
    assert torch.equal(net.head.weight, weights["head.weight"].half())
    load_strict(net, weights, where="a", assign=True)
    assert net.head.weight.dtype is torch.float16
    for wrong in (
        torch.ones(2, 4, dtype=torch.int64),
        torch.ones(2, 4) > 0,
        torch.ones(2, 4, dtype=torch.complex64),
    ):
        with pytest.raises(KeyMismatch) as error:
            load_strict(net, {**weights, "head.weight": wrong}, where="a")
        assert set(error.value.mistyped) == {"head.weight"}


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf"), 1e6))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_non_finite_weights_are_refused(bad, dtype):
    net = Net().half()  # 1e6 is infinite there
    before = snapshot(net)
    weights = other_weights()
    weights["head.weight"] = weights["head.weight"].to(dtype)
    weights["head.weight"][1, 2] = bad
    weights["body.1.running_var"][:] = float("nan")
    with pytest.raises(NonFiniteWeights, match=r"head.weight") as error:
        load_strict(net, weights, where="a")
    assert error.value.names == ["body.1.running_var", "head.weight"] and untouched(net, before)
    weights["body.1.running_var"][:] = 1
    if bad == 1e6:
        load_strict(Net(), weights, where="a")


def test_small_types_are_checked_for_finite_values():
    net = nn.ParameterDict(
        {"c": nn.Parameter(torch.ones(2, dtype=torch.complex64)), "e": nn.Parameter(torch.ones(0))}
    )
    good = {"c": torch.ones(2, dtype=torch.complex128), "e": torch.ones(0)}
    load_strict(net, good, where="a")
    with pytest.raises(NonFiniteWeights):
        load_strict(net, {**good, "c": torch.tensor([1, complex(0, float("nan"))])}, where="a")
    eight = nn.ParameterDict({"w": nn.Parameter(torch.ones(2))})
    load_strict(eight, {"w": torch.ones(2).to(torch.float8_e5m2)}, where="a")
    with pytest.raises(NonFiniteWeights):
        load_strict(eight, {"w": torch.tensor([1, float("inf")]).to(torch.float8_e5m2)}, where="a")


@pytest.mark.parametrize("assign", (False, True))
def test_tied_parameters(assign):
    weights = other_weights(tied=True)
    for absent in ("head.weight", "other.weight", None):
        net = Net(tied=True)
        load_strict(net, {n: t for n, t in weights.items() if n != absent}, where="a", assign=assign)
        assert net.head.weight is net.other.weight and torch.equal(net.head.weight, weights["head.weight"])
    with pytest.raises(KeyMismatch) as error:
        load_strict(Net(tied=True), {**weights, "other.weight": torch.zeros(2, 4)}, where="a", assign=assign)
    assert error.value.contradictory == ["head.weight = other.weight"]
    with pytest.raises(KeyMismatch) as error:
        load_strict(
            Net(tied=True), {n: t for n, t in weights.items() if "d.w" not in n and "r.w" not in n}, where="a"
        )
    assert set(error.value.missing) == {"head.weight", "other.weight"}


def test_a_module_without_memory(tmp_path):
    with torch.device("meta"):
        net = Net()
    weights = other_weights()
    with pytest.raises(CheckpointError, match="assign=True"):
        load_strict(net, weights, where="a")
    write_safetensors(tmp_path / "a.safetensors", weights, {})
    read = read_weights(tmp_path / "a.safetensors").tensors
    load_strict(net, read, where="a", assign=True)
    assert untouched(net, weights)
    assert net.head.weight.data_ptr() == read["head.weight"].data_ptr()  # still the file's pages
    with pytest.raises(CheckpointError, match="no data"):
        load_strict(net, read_weights(tmp_path / "a.safetensors", "meta").tensors, where="a")


def test_assigned_parameters_do_not_share_memory():
    shared = torch.ones(2, 4)
    net = Net()
    load_strict(
        net, {**other_weights(), "head.weight": shared, "other.weight": shared}, where="a", assign=True
    )
    with torch.no_grad():
        net.head.weight.zero_()
    assert net.other.weight.sum() == 8


# EMA names


def test_ema_names_follow_the_original():
    names = ["diffusion_model.out.0.weight", "diffusion_model.input_blocks.1.0.in_layers.2.bias"]
    assert ema_names(names) == {
        "model_ema.diffusion_modelout0weight": names[0],
        "model_ema.diffusion_modelinput_blocks10in_layers2bias": names[1],
    }


def test_ema_names_of_the_reference_networks_are_unique():
    names = [
        name.removeprefix("model.") for name in load_keys("compvis-ldm-class") if name.startswith("model.")
    ]
    assert len(names) > 100
    assert sorted(ema_names(names).values()) == sorted(names)


def test_ema_collisions_are_noticed():
    with pytest.raises(ValueError, match=r"blocks.1.10.w' and 'blocks.11.0.w"):
        ema_names(["blocks.1.10.w", "blocks.11.0.w"])
    with pytest.raises(ValueError, match="decay"):
        ema_names(["de.cay"])
