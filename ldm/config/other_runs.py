"""`${from_run:RUN,KEY}` in a YAML: a value that another run's `config.yaml` has."""

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.tree import ConfigError, leaves, parts_of, to_plain
from ldm.wording import did_you_mean, some

_MANDATORY = re.compile(r"\$\{from_run:([^,]*),([^,]*)\}")
_ALONE = re.compile(r"\$\{from_run:[^:]*\}")
_NONE = object()
#: What a data set's params say about the images, besides what the shipped configs take over.
_ABOUT_IMAGES = ("channels", "background", "on_error", "layout", "extensions", "max_pixels")


def from_run(
    run: str | None, key: str, default: Any = _NONE, *, _root_: Any = None, _node_: Any = None
) -> Any:
    """A value from another run's `config.yaml`; in a YAML `${from_run:${first_stage},data.params.root}`.

    A run that goes on keeps what it took when it began, whatever became of the other run since. `run` may
    also be the YAML of a run that has not begun, for those who plan.

    Raises:
        ConfigError: there is no such run, or it does not have the key, and there is no `default`.
    """
    kept = _kept(run, _root_, _node_)
    if kept is not None:
        return kept
    file = Path(run or "")
    if file.suffix not in (".yaml", ".yml"):
        file /= "config.yaml"
    there = run is not None and file.is_file()
    value = OmegaConf.select(OmegaConf.load(file), key) if there else None
    if value is not None:
        return to_plain(value)
    if default is _NONE:
        raise ConfigError(f"{file} has no {key}; give {key}=..." if there else _no_run(run, key, _root_))
    return default


# OmegaConf renamed the function in 2.4.
register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
register("from_run", from_run, replace=True)


def _kept(run: str | None, root: Any, node: Any) -> Any:
    """What the run that is about to go on took for this place of its config; None where none goes on."""
    if not isinstance(root, DictConfig) or not _ALONE.fullmatch(str(node._value())):
        return None
    folder = Path(str(OmegaConf.select(root, "runs") or "runs"), str(OmegaConf.select(root, "name")))
    if not (folder / "config.yaml").is_file() or not list(folder.glob("checkpoints/step-*.ckpt")):
        return None
    own = OmegaConf.load(folder / "config.yaml")
    if OmegaConf.select(own, "first_stage") != run:
        return None
    value = OmegaConf.select(own, ".".join(parts_of(node._get_full_key(None))))
    return None if value is None else to_plain(value)


def _no_run(run: str | None, key: str, root: Any) -> str:
    """Why there is nothing to take values from, and what to give; the same for every key."""
    tree = OmegaConf.to_container(root, resolve=False) if isinstance(root, DictConfig) else {}
    wanted = [path for path, value in leaves(tree) if _MANDATORY.search(str(value))] or [key]
    give = "give " + " and ".join(f"{path}=..." for path in wanted)
    name = "first_stage" if tree.get("first_stage") == run else "run"
    if run is None:
        return f"{name} is null, so there is no run to take the images from; {give}"
    path = Path(run)
    if path.is_file():
        return (
            f"{name} {run} is a file, which does not say what images it learned from; {give}, or a run folder"
        )
    around = path if path.is_dir() else path.parent
    runs = sorted(p.name for p in around.glob("*") if (p / "config.yaml").is_file())
    has = f"; {around} has {some(runs)}" if runs else ""
    why = "is no run folder (it has no config.yaml)" if path.is_dir() else "does not exist"
    return f"{name} {run} {why}{did_you_mean(path.name, runs, f'{around}/') or has}; {give}, or a run folder"


def not_repeated(run: Any, cfg: DictConfig) -> list[str]:
    """Params such as `on_error=report` of a first stage over the same images that this run's data lacks."""
    file = Path(run.first_stage or "") / "config.yaml"
    if run.first_stage is None or not file.is_file():
        return []
    other = OmegaConf.load(file).get("data") or {}
    theirs, ours = other.get("params") or {}, cfg.data.get("params") or {}
    if other.get("target") != cfg.data.target or theirs.get("root") != ours.get("root"):
        return []
    lacks = [name for name in _ABOUT_IMAGES if name in theirs and name not in ours]
    return [f"data.params.{name}={theirs[name]}" for name in lacks]
