"""What to say when a state dict and a module do not fit."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ldm.wording import nearest

Shape = tuple[int, ...]
_LISTED = 20  # so many names are listed one by one; more are summed up by prefix
_GROUPS = 12
# What wrappers put into the middle or the front of names.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass
class KeyReport:
    """Every way in which a file and a module differ.

    Attributes:
        missing: name -> shape of what the module has and the file lacks.
        extra: name -> shape of what the file has and the module does not know.
        misshaped: name -> (shape in the file, shape in the module).
        mistyped: name -> (type in the file, type in the module), where no conversion keeps the meaning.
        contradictory: names of one tied parameter for which the file has different values.
    """

    missing: dict[str, Shape] = field(default_factory=dict)
    extra: dict[str, Shape] = field(default_factory=dict)
    misshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    mistyped: dict[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    contradictory: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not any(vars(self).values())

    def text(self, module: str) -> str:
        """The report, with a guess at the reason where one explains it."""
        sections = {
            "missing from the file": self.missing,
            "in the file, but unknown to the module": self.extra,
            "of another shape": _both(self.misshaped),
            "of another type": _both(self.mistyped),
            "one parameter in the module, but different in the file": dict.fromkeys(self.contradictory, ""),
        }
        lines = [line for title, entries in sections.items() for line in _section(title, entries)]
        hint = explanation(self.missing, self.extra)
        return "\n".join([f"does not fit {module}", *lines, *([hint] if hint else [])])


def _both(pairs: Mapping[str, tuple]) -> dict[str, str]:
    return {name: f"is {file} in the file, {here} in the module" for name, (file, here) in pairs.items()}


def _section(title: str, entries: Mapping[str, object]) -> list[str]:
    if not entries:
        return []
    head = f"  {len(entries)} {title}:"
    shown = {name: f"{name} {what}".rstrip() for name, what in entries.items()}
    if len(entries) <= _LISTED:
        return [head, *(f"    {line}" for line in shown.values())]
    groups = group_by_prefix(entries)
    lines = [f"    {prefix} ({len(names)}), such as {shown[names[0]]}" for prefix, names in groups.items()]
    return [head, *lines, "    (the exception's attributes hold the full lists)"]


def group_by_prefix(names: Iterable[str]) -> dict[str, list[str]]:
    """Names under their longest dotted prefixes of one length that make at most a dozen groups."""
    names, best = list(names), {}
    for depth in range(1, max(name.count(".") for name in names) + 2):
        groups: dict[str, list[str]] = {}
        for name in names:
            parts = name.split(".")
            label = ".".join(parts[:depth]) + (".*" if len(parts) > depth else "")
            groups.setdefault(label, []).append(name)
        if best and len(groups) > _GROUPS:
            break
        best = groups
    # Flat names: the largest groups, and the others in one.
    largest = sorted(best, key=lambda label: -len(best[label]))
    kept = largest if len(best) <= _GROUPS else largest[: _GROUPS - 1]
    others = [name for label in best if label not in kept for name in best[label]]
    return {label: best[label] for label in best if label in kept} | ({"others": others} if others else {})


def explanation(missing: Iterable[str], extra: Iterable[str]) -> str | None:
    """A sentence if one change of names makes all missing names appear among the extra ones, or nearly so."""
    missing, extra = set(missing), set(extra)
    if not missing or not extra:
        return None
    for wrapper in _WRAPPERS:
        if missing <= {name.replace(wrapper, "") for name in extra if wrapper in name}:
            return f"  All missing names are in the file with a wrapper's {wrapper!r} inside: remove it."
    ahead, behind = _best_prefix(missing, extra), _best_prefix(extra, missing)
    for (prefix, found), how in ((ahead, "behind {!r}: strip it"), (behind, "without their {!r}: add it")):
        if found > len(missing) / 2:
            share = f"All {found}" if found == len(missing) else f"{found} of {len(missing)}"
            return f"  {share} missing names are in the file {how.format(prefix)}."
    prefix, found = behind
    if found > len(extra) / 2:
        what = f"unknown names in the file are missing ones without their {prefix!r}"
        return f"  {found} of {len(extra)} {what}: it may hold that part of the model alone."
    close = {name: nearest(name, extra) for name in sorted(missing)} if len(missing) <= 5 else {}
    pairs = [f"{name} may be {match}" for name, match in close.items() if match]
    return f"  Nearest names: {', '.join(pairs)}." if pairs else None


def _best_prefix(short: set[str], long: set[str]) -> tuple[str, int]:
    """The dotted prefix that the most names of `long` have before a name of `short`, and how many."""
    counts: Counter[str] = Counter()
    for name in long:
        start = name.find(".") + 1
        while start:
            if name[start:] in short:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1
    return counts.most_common(1)[0] if counts else ("", 0)
