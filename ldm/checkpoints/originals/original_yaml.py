"""The YAML of an original project: the model in it, and nothing else; what its parts are read with.

Such a file describes a whole training run. Data sets that were never released, paths that do not exist and
settings of the training are noted, and are no errors.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ldm.checkpoints.description import node, targets_of
from ldm.config import ConfigError
from ldm.config.signatures import is_target
from ldm.config.tree import reason_of
from ldm.wording import did_you_mean, some

_REQUIRED = object()
# The learning rate stands beside `target` in all of these projects.
_PART = ("target", "params", "base_learning_rate")


@dataclass(frozen=True)
class Translated:
    """A part in this toolkit's terms.

    Attributes:
        node: `{target, params}` as `ldm.config` builds it.
        view: module -> one that shares its parameters, under the names that the original's files have.
        averaged: beginning of the view's names of which files hold averaged copies ("" is all, None none).
        latent_scale: whether the latents' scale stands in the file (`scale_by_std`), as `scale_factor`.
    """

    node: dict[str, Any]
    view: Callable[[nn.Module], nn.Module] = lambda module: module
    averaged: str | None = None
    latent_scale: float | None = None
    scale_in_file: bool = False


@dataclass
class Reading:
    """What came up while a YAML was read: `problems` are errors, `notes` say what was left unread and why."""

    origin: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, path: str, what: str) -> None:
        self.problems.append(f"{self.origin}: {path}: {what}")

    def note(self, path: str, what: str) -> None:
        self.notes.append(f"{path}: {what}")

    def check(self) -> None:
        """Raise one ConfigError with all problems so far."""
        if self.problems:
            raise ConfigError(*dict.fromkeys(self.problems))


class Part:
    """A `target` with its `params` in an original's YAML. Every parameter must be taken or ignored by name.

    Attributes:
        target: the dotted path of the class in the original project.
        path: where the part stands in the YAML.
    """

    def __init__(self, node: Any, path: str, reading: Reading):
        self.path, self.reading = path, reading
        if not is_target(node):
            reading.problem(path, f"expected a mapping with a target, got {node!r:.80}")
            reading.check()
        self.target = str(node["target"])
        params = node.get("params")
        if params is not None and not isinstance(params, Mapping):
            reading.problem(self.place(), f"expected a mapping of parameters, got {params!r:.80}")
            params = None
        self.params: dict[str, Any] = dict(params or {})
        self._beside = {name: value for name, value in node.items() if name not in _PART}
        self._known: dict[str, None] = {}

    def place(self, name: str = "") -> str:
        """The path in the YAML of a parameter, or of all of them."""
        return ".".join(filter(None, (self.path, "params", name)))

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a parameter, or `default`; a missing one without a default is a problem."""
        self._known[name] = None
        if name in self.params:
            return self.params.pop(name)
        if default is _REQUIRED:
            self.reading.problem(self.place(), f"{self.target} needs {name}")
            self.reading.check()
        return default

    def given(self, *names: str, **renamed: str) -> dict[str, Any]:
        """The parameters that are given, of `names` and of `renamed` (theirs=ours), by our names."""
        ours = {name: name for name in names} | renamed
        self._known |= dict.fromkeys(ours)
        return {ours[name]: self.params.pop(name) for name in ours if name in self.params}

    def part(self, name: str) -> "Part":
        """A parameter that is itself a part."""
        return Part(self.take(name), self.place(name), self.reading)

    def translator(self, table: Mapping[str, Callable], what: str) -> Callable:
        """Of the part's target; an unknown one is a problem that names the nearest."""
        if self.target not in table:
            near = did_you_mean(self.target, table)
            known = ", ".join(dict.fromkeys(target.rpartition(".")[2] for target in table))
            self.problem_beside("target", f"{self.target!r} is no known {what}{near} (known: {known})")
            self.reading.check()
        return table[self.target]

    def translated(self, name: str, table: Mapping[str, Callable], what: str, *more: Any) -> Any:
        """What a table's translator makes of a parameter that is itself a part."""
        inner = self.part(name)
        return inner.translator(table, what)(inner, *more)

    def node(
        self,
        target: str,
        *given: str,
        needs: Collection[str] = (),
        renamed: Mapping[str, str] | None = None,
        ignored: Collection[str] = (),
        **fixed: Any,
    ) -> dict[str, Any]:
        """The whole part as one of ours, `{target, params}`, that differs in names alone.

        Args:
            given, needs: parameters that it may and must have; `renamed` (theirs: ours) it may have.
            ignored: as for `finish`.
            fixed: our parameters, whatever is given.
        """
        params = {name: self.take(name) for name in needs} | self.given(*given, **(renamed or {}))
        self.finish(*ignored)
        return node(target, **(params | fixed))

    def take_beside(self, name: str, default: Any = None) -> Any:
        """The value of a key that stands beside `target`."""
        return self._beside.pop(name, default)

    def only(self, name: str, allowed: tuple, why: str) -> Any:
        """Take a parameter that is known, but only with the values `allowed` (the first is its default)."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            self.problem(name, f"is {value!r}; {why}")
        return value

    def problem(self, name: str, what: str) -> None:
        """A problem with a parameter."""
        self.reading.problem(self.place(name), what)

    def problem_beside(self, name: str, what: str) -> None:
        """A problem with a key that stands beside `target`, or with the target itself."""
        self.reading.problem(".".join(filter(None, (self.path, name))), what)

    def refuse_target(self, supported: str) -> None:
        self.problem_beside("target", f"{self.target!r} is not supported (supported: {supported})")

    def finish(self, *ignored: str) -> None:
        """Leave out the parameters `ignored`, which have no part in the model; any other is a problem."""
        for name in ignored:
            value = self.take(name, None)
            if name in ("ckpt_path", "ckpt_engine") and value is not None:
                why = "the weights come from the checkpoint that is loaded"
                self.reading.note(self.place(name), f"{value!r:.80} is not read: {why}")
        known = list(self._known)
        takes = ", ".join(known) or "nothing"
        for name in self.params:
            self.problem(name, f"unknown{did_you_mean(name, known)} ({self.target} takes: {takes})")
        for name in self._beside:
            self.problem_beside(name, "stands beside target; it is not known there")


@dataclass(frozen=True)
class Original:
    """The model part of a YAML, and the section `diffusion` that may stand beside it (see `openai`)."""

    model: Part
    diffusion: dict | None
    reading: Reading


def read_original(config: str | Path | Mapping) -> Original:
    """The model in a YAML: a whole file with a `model:` tree, or a bare `target:` with its `params:`.

    Interpolations such as `${model.params.first_stage_config}` are resolved against the whole file, but only
    those in the model: a data section may refer to what does not exist.

    Raises:
        ConfigError: no such file, not YAML, no model in it, or an interpolation that leads nowhere.
    """
    tree, origin = read_tree(config)
    path = "model" if "model" in tree else ""
    if not path and "target" not in tree:
        has = some(list(map(str, tree)), 20) or "nothing"
        hint = "; a first stage is another run's: load its model.safetensors" if "network" in tree else ""
        raise ConfigError(f"{origin}: has neither `model:` nor `target:` at its top, but {has}{hint}")
    try:
        selected = tree.model if path else tree
        if isinstance(selected, DictConfig):
            selected = OmegaConf.to_container(selected, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where, hint = (
            getattr(error, "full_key", None) or path,
            "references are to the whole file: give the whole",
        )
        raise ConfigError(f"{origin}: {where}: {reason_of(error)} ({hint})") from error
    reading = Reading(origin)
    diffusion = None if path else selected.pop("diffusion", None)
    if not path:
        selected = {name: selected[name] for name in _PART if name in selected}
    for name, section in OmegaConf.to_container(tree, resolve=False).items():
        if (
            name not in ((path,) if path else ("target", "params", "diffusion"))
            and name != "base_learning_rate"
        ):
            targets = dict.fromkeys(t for t in targets_of(section) if not t.startswith("main."))
            names = f" (it names {', '.join(targets)})" if name == "data" and targets else ""
            reading.note(str(name), f"not read, only the model is wanted{names}")
    return Original(Part(selected, path, reading), diffusion, reading)


def read_tree(config: str | Path | Mapping) -> tuple[DictConfig, str]:
    """A YAML's content as it stands, interpolations unresolved, and what to call it in messages.

    Raises:
        ConfigError: no such file, or it is no YAML with a mapping.
    """
    if isinstance(config, Mapping | DictConfig):
        return OmegaConf.create(config) if isinstance(config, Mapping) else config, "the config"
    path = Path(config)
    if not path.is_file():
        beside = sorted(p.name for p in (path if path.is_dir() else path.parent).glob("*.y*ml"))
        what = f"no such file{did_you_mean(path.name, beside)}"
        if path.is_dir():
            what = f"is a folder, not a YAML file (in it: {some(beside) or 'none'})"
        raise ConfigError(f"{path}: {what}")
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {str(error).strip()}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: expected a mapping with `model:` or `target:`")
    return tree, str(path)
