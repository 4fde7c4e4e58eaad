"""Checkpoints as the original projects wrote them: weights under a wrapper, with buffers and callbacks."""

import sys
import types

import torch
import yaml
from reference_data import filled, load_keys

from ldm.diffusion.schedule import DiscreteSchedule


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return {name: filled(name, tuple(shape)) for name, shape in load_keys(folder).items()}


def write_config(path, tree: dict) -> str:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


def schedule_buffers() -> dict[str, torch.Tensor]:
    return DiscreteSchedule("linear", 1000, 0.0015, 0.0195).buffers_like_original()


def averaged_copies(weights: dict[str, torch.Tensor], beginning: str) -> dict[str, torch.Tensor]:
    """What LitEma stores beside the weights whose names begin so."""
    names = [name for name in weights if name.startswith(beginning)]
    copies = {"model_ema." + name.removeprefix(beginning).replace(".", ""): weights[name] for name in names}
    counters = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }
    return copies | counters


def lightning_checkpoint(path, state_dict: dict[str, torch.Tensor]) -> str:
    """`torch.save` of what an old Lightning wrote: a callback's class is a key, which none may import."""
    module = types.ModuleType("lightning_of_old.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    parent = types.ModuleType("lightning_of_old")
    sys.modules |= {"lightning_of_old": parent, module.__name__: module}
    try:
        content = {
            "epoch": 3,
            "global_step": 1234,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": state_dict,
            "callbacks": {
                module.ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "best_model_path": "x.ckpt"}
            },
            "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": []}],
            "lr_schedulers": [],
        }
        torch.save(content, path)
    finally:
        del sys.modules["lightning_of_old"], sys.modules[module.__name__]
    return str(path)
