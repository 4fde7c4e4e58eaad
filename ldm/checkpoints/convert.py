"""`ldm.convert`: from one format of weights to another."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm.checkpoints import native
from ldm.checkpoints.diffusers.export import save_diffusers
from ldm.checkpoints.load import load
from ldm.checkpoints.originals.compvis_export import save_compvis
from ldm.wording import some

FILES = {"native": native.MODEL_FILE, "compvis": "model.ckpt"}
_OTHER_FILES = (".ckpt", ".safetensors", ".pt", ".bin")


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote: the file or folder, all files, and what of `config` was not read."""

    path: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    to: Literal["native", "compvis", "diffusers"] = "native",
    *,
    config: str | Path | Mapping | None = None,
    ema: bool = True,
    overwrite: bool = False,
) -> Converted:
    """Load a model and write it in another format; converted back, it has the same bits.

    Args:
        source: whatever `ldm.load` opens, with `config` and `ema` as there.
        target: a .safetensors file for `native`, a .ckpt for `compvis`, beside which its YAML is written; a
            folder gets `model.safetensors` or `model.ckpt`. For `diffusers` a folder, new or empty.
        overwrite: replace files that are there.

    Raises:
        FileNotFoundError, ValueError: `source` cannot be loaded, or the format cannot express it.
        FileExistsError: something is at `target` already; nothing was written.
    """
    source, target = Path(source), _target(Path(source), Path(target), to)
    files = (target, target.with_suffix(".yaml")) if to == "compvis" else (target,)
    taken = [] if overwrite or to == "diffusers" else [file for file in files if file.exists()]
    if taken:
        raise FileExistsError(f"{taken[0]} exists already, and is not to be overwritten")
    model = load(source, config, ema)
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "native":
        native.save_model(target, model.state_dict(), model.description)
    elif to == "compvis":
        save_compvis(model, target)
    else:
        save_diffusers(model, target)
        files = tuple(sorted(file for file in target.rglob("*") if file.is_file()))
    return Converted(target, files, tuple(model.description.notes or () if config else ()))


def _target(source: Path, target: Path, to: str) -> Path:
    """The file or folder to write."""
    if to == "diffusers":
        if target.suffix in _OTHER_FILES:
            raise ValueError(f"{target} looks like a file; the format diffusers writes a folder")
        if target.exists() and (target.is_file() or any(target.iterdir())):
            raise FileExistsError(f"{target} exists already and is not empty")
    elif to not in FILES:
        raise ValueError(f"format {to!r} is none of {some([*FILES, 'diffusers'])}")
    elif target.is_dir() or not target.suffix:
        target = target / FILES[to]
    elif target.suffix != Path(FILES[to]).suffix:
        raise ValueError(f"{target}: the format {to} writes a {Path(FILES[to]).suffix} file")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{source} would be written over itself")
    return target
