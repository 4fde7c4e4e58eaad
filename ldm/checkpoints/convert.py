"""From one format of weights to another."""

from pathlib import Path

from torch import nn

from ldm.checkpoints import load, native
from ldm.checkpoints.diffusers.export import save_diffusers
from ldm.checkpoints.originals.compvis_export import save_compvis
from ldm.checkpoints.unfilled import build_unfilled

FILES = {"native": native.MODEL_FILE, "compvis": "model.ckpt"}


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    config: Path | None = None,
    ema: bool = True,
    overwrite: bool = False,
) -> list[str]:
    """Load `source`, write it to `target` in the format `to`; returns what to tell the user.

    Raises:
        FileNotFoundError, ValueError: `source` cannot be loaded, or the format cannot express it.
        FileExistsError: something is at `target` already; nothing was written.
    """
    target = _target(source, target, to)
    yaml = [target.with_suffix(".yaml")] if to == "compvis" else []
    if to == "diffusers":
        taken = [target] if target.exists() and (target.is_file() or any(target.iterdir())) else []
    else:
        taken = [file for file in [target, *yaml] if file.exists()]
    if taken and (to == "diffusers" or not overwrite):
        hint = "choose another folder" if to == "diffusers" else "choose another DST, or say --overwrite"
        raise FileExistsError(f"{taken[0]} exists already; {hint}")
    model = load(source, config, ema)
    unread = (getattr(model, "description", None) or {}).get("notes", ()) if config else ()
    notes = [f"note: {config}: {note}" for note in unread]
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "native":
        save_native(model, target, str(source))
        return [*notes, f"{target}: open it with ldm.load or sample.py"]
    if to == "compvis":
        written = save_compvis(model, target)
        return [*notes, f"{target}: open it with the original's code and {written}, or with ldm.load"]
    save_diffusers(model, target)
    parts = ", ".join(sorted(path.name for path in target.iterdir()))
    return [*notes, f"{target} ({parts}): open its parts with diffusers, or all of it with ldm.load"]


def _target(source: Path, target: Path, to: str) -> Path:
    """The file or folder to write; a folder stands for the usual file in it.

    Raises:
        ValueError: a file name that does not say what is written, or the source itself.
    """
    if to == "diffusers":
        if target.suffix in (".ckpt", ".safetensors", ".pt", ".bin"):
            raise ValueError(f"{target} looks like a file; --to diffusers writes a folder")
    elif target.is_dir() or not target.suffix:
        target = target / FILES[to]
    elif target.suffix != Path(FILES[to]).suffix:
        raise ValueError(f"{target}: --to {to} writes a {Path(FILES[to]).suffix} file")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{source} would be written over itself; choose another DST")
    return target


def save_native(model: nn.Module, path: Path, where: str) -> None:
    """Write a `model.safetensors` that describes itself, after making sure that it can be read again.

    Raises:
        ValueError: the model has no description, or one that does not build it.
    """
    description = getattr(model, "description", None) or {}
    if description.get("format") != native.FORMAT:
        raise ValueError(
            f"{where} does not say how its model is built, so no file that describes itself can be made"
        )
    tensors = model.state_dict()
    shapes = {
        name: tuple(t.shape) for name, t in build_unfilled(description["model"], where).state_dict().items()
    }
    if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise ValueError(f"{where}: the description of the model does not fit its weights")
    native.save_model(path, tensors, description)
