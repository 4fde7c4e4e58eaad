"""The DiT in the UNet's place in a training run: each way in which a condition enters it."""

from pathlib import Path

import pytest
import torch
import training_runs as T
from tiny_runs import randomized
from torch.utils.data import default_collate

import ldm
from ldm.training import method as method_module
from ldm.training import train

TINY = dict(input_size=T.SIZE, in_channels=3, patch_size=4, hidden_size=24, depth=2, num_heads=2)


def embedded(kind: str) -> dict:
    params = {"num_classes": "auto", "dim": 8, "kind": kind, "drop": 0.2}
    return {"target": "ldm.conditioning.ClassEmbedder", "params": params}


# name -> (arguments of the DiT, embedders)
WAYS = {
    "vector": ({"num_classes": "sequential", "adm_in_channels": 8}, [embedded("vector")]),
    "own table": (
        {"num_classes": "auto"},
        [{"target": "ldm.conditioning.ClassLabel", "params": {"num_classes": "auto", "drop": 0.2}}],
    ),
    "cross-attention": ({"context_dim": 8}, [embedded("crossattn")]),
    "tokens": ({"context_dim": 8, "context_mode": "tokens"}, [embedded("crossattn")]),
    "modern": (
        {"context_dim": 8, "positions": "rotary", "norm": "rms", "mlp": "swiglu", "qk_norm": True,
         "num_registers": 2, "in_context_tokens": 1, "use_checkpoint": True},
        [embedded("crossattn")],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("dit")
    T.write_images(place / "images")
    return place


def config_of(place: Path, way: str, **changes) -> Path:
    arguments, embedders = WAYS[way]
    config = T.diffusion_config(place / "images", place / "runs", None, f"dit-{way.replace(' ', '-')}")
    config |= {
        "network": {"target": "ldm.models.dit.DiT", "params": {**TINY, **arguments}},
        "conditioner": {"target": "ldm.conditioning.Conditioner", "params": {"embedders": embedders}},
        **changes,
    }
    return T.write_config(place / "config.yaml", config)


@pytest.mark.parametrize("way", WAYS)
def test_every_parameter_receives_a_gradient_in_training(place, monkeypatch, way):
    stage = T.build_method(config_of(place, way))
    randomized(stage.model)  # a fresh DiT is closed by its zeros
    task = stage.train()
    trainer = T.attach(task)
    found = {}

    def spy(optimizer, norm, step):
        found.update({name: p.grad for name, p in task.named_parameters() if p.grad is not None})

    monkeypatch.setattr(method_module, "guarded_step", spy)
    task.training_step(
        default_collate([stage.train_set[(i % len(stage.train_set), i)] for i in range(32)]), 0
    )
    assert trainer
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    # A bias of the keys changes nothing; where the context is one token, so do queries, keys and their norm.
    deaf = (
        "k_proj.bias",
        "k_proj.weight",
        "q_proj.weight",
        "q_proj.bias",
        "norm_cross.weight",
        "norm_cross.bias",
    )
    silent = {name for name in trained if name not in found or not found[name].abs().max() > 0}
    assert {name for name in silent if not name.endswith(deaf)} == set()


@pytest.mark.parametrize("way", ["own table", "modern"])
def test_a_run_is_trained_and_sampled(place, way):
    path = config_of(place, way, training={**T.TRAINING, "steps": 3})
    train(path, [])
    model = ldm.load(place / "runs" / f"dit-{way.replace(' ', '-')}")
    assert type(model.network).__name__ == "DiT"
    if way == "own table":
        assert model.network.num_classes == 2 and model.conditioner.unconditional(1)["vector"].tolist() == [2]
    cond = model.conditioner({"label": torch.tensor([0, 1])})
    images = model.to_image(ldm.sample(model, cond=cond, guidance=2.0, steps=2))
    assert images.shape == (2, 3, T.SIZE, T.SIZE) and images.isfinite().all()
