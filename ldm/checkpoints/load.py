"""`ldm.load`: one door to every file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoints import native
from ldm.checkpoints.diffusers import folder as diffusers_folder
from ldm.checkpoints.originals import compvis_export, published
from ldm.checkpoints.trust import is_run_config, trusted_targets
from ldm.weights.errors import CheckpointError
from ldm.weights.reading import INDEX
from ldm.wording import nearest, some

_LISTED = 8
_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def load(
    path: str | Path,
    config: str | Path | Mapping | None = None,
    ema: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A trained model in eval mode: a first stage, a `LatentDiffusion`, or a bare network.

    Nothing in a file is executed, and only models of this package are built from its description.

    Args:
        path: a run folder, its `model.safetensors`, or one of its checkpoints; a folder of diffusers (a
            pipeline or one of its parts); or, with `config`, a checkpoint of the original latent diffusion,
            Stable Diffusion, sgm or OpenAI's diffusion projects, the index of its shards, or its folder.
        config: the YAML of the original project, unchanged (see `originals.published`), or one of this
            toolkit, for a file that does not describe its model itself. For a model trained here that has
            classes of yours, the training config: what this names outside `ldm` is then imported.
        ema: take the averaged weights where there are any; False takes the raw ones.
        device, dtype: where the model goes and, if given, the type of its floating-point parameters. Latents
            and images keep their own type, whatever the parameters have.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: the file is no model, is damaged, or has missing, extra or mis-shaped keys.
        ConfigError: `config` is no YAML of a model, or asks for what is not here.
        ValueError: `dtype` is no floating-point type.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(_not_found(path))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type (torch.bfloat16, ...) or None, got {dtype!r}")
    trusted: frozenset[str] = frozenset()
    if config is not None and is_run_config(config) and _describes_itself(path):
        trusted = trusted_targets(config)
        model = _load_own(path, ema, trusted)
    elif config is not None:
        model = published.load_published(_one_file(path), config, ema, dtype)
    else:
        model = _load_own(path, ema)
    model.trusted = trusted  # what the user named may also sample
    return model.to(device=device, dtype=dtype)


def _load_own(path: Path, ema: bool, trusted: frozenset[str] = frozenset()) -> nn.Module:
    """The model in a file or folder that describes it."""
    if native.is_run_folder(path):
        if native.describes_itself(path) or not (files := _weights_in(path)):
            return native.load_run(path, ema, trusted)
        raise _foreign(path, f"is no run of this toolkit: it holds {files[-1].relative_to(path)}", files[-1])
    if diffusers_folder.is_diffusers_folder(path):
        return diffusers_folder.load_diffusers(path, ema)
    if path.is_dir():
        raise _no_run(path)
    if path.name.endswith(INDEX) or (path.suffix == ".safetensors" and native.read_description(path) is None):
        raise _foreign(path, "holds weights, but no description of their model", path)
    if path.suffix == ".safetensors":
        return native.load_model(path, ema, trusted)
    try:
        return native.load_training(path, ema, trusted)
    except CheckpointError as error:
        if compvis_export.is_exported(path):
            return compvis_export.load_exported(path, ema)
        if type(error) is CheckpointError:  # whole and safe, but of another kind
            raise _foreign(path, error.reason, path) from error
        raise


def _describes_itself(path: Path) -> bool:
    if native.describes_itself(path) or diffusers_folder.is_diffusers_folder(path):
        return True
    return path.is_file() and compvis_export.is_exported(path)


def _foreign(path: Path, what: str, file: Path) -> CheckpointError:
    """Of another project's file; the original's runs have a folder of configs beside the checkpoints'."""
    beside = [*sorted(file.parent.glob("*.y*ml")), *sorted(file.parent.parent.glob("configs/*-project.yaml"))]
    config = str(beside[0] if beside else "the YAML it was trained with")
    advice = f"A file of another project needs that project's config: config={config!r}"
    return CheckpointError(str(path), f"{what}. {advice}")


def _one_file(path: Path) -> Path:
    """The file of weights that a folder beside a config stands for, if it holds just one."""
    if not path.is_dir():
        return path
    indices = list(path.glob(f"*{INDEX}"))
    files = indices if len(indices) == 1 else _weights_in(path)
    if len(files) > 1:
        names = some([str(file.relative_to(path)) for file in files], _LISTED)
        raise CheckpointError(str(path), f"is a folder with several files of weights; give one: {names}")
    return files[0] if files else path


def _weights_in(folder: Path) -> list[Path]:
    """Files of other projects in a folder, or in its `checkpoints` as in the original's runs."""
    places = (folder, folder / "checkpoints")
    return sorted(file for place in places for file in place.glob("*") if file.suffix in _SUFFIXES)


def _not_found(path: Path) -> str:
    """What the path should be, and what the nearest folder that exists has."""
    here, whole = Path.cwd(), path.absolute()
    folder = next(parent for parent in whole.parents if parent.is_dir())
    shown = folder.relative_to(here) if not path.is_absolute() and folder.is_relative_to(here) else folder
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    found = nearest(whole.relative_to(folder).parts[0], names)
    has = f"Did you mean {shown / found}?" if found else f"{shown}/ has {some(names, _LISTED) or 'nothing'}."
    return f"{path} does not exist; give a run folder, a {native.MODEL_FILE} or a checkpoint. {has}"


def _no_run(path: Path) -> CheckpointError:
    names = sorted(p.name for p in path.iterdir())
    if runs := [name for name in names if native.is_run_folder(path / name)]:
        return CheckpointError(str(path), f"is no run folder itself, but holds these: {some(runs, _LISTED)}")
    if native.is_run_folder(path.parent):
        return CheckpointError(
            str(path), f"is no run folder, but a part of one; give {path.parent}, or a file"
        )
    inside = some(names, _LISTED) or "nothing"
    what = f"is no run folder: it has no {native.MODEL_FILE} and no checkpoints/, but {inside}"
    if files := _weights_in(path):
        return _foreign(path, f"{what}. {files[0].name} may be another project's", files[0])
    return CheckpointError(str(path), what)
