"""What an object was made with: its class and arguments, kept by the object itself.

From them alone a model is saved, described, exported and built again. `ldm.config` records in the same place
what it made of a class that knows nothing of this.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

C = TypeVar("C", bound=type)

_ATTRIBUTE = "_made_with"


def remembers_arguments(cls: C) -> C:
    """Class decorator: an instance keeps the arguments that it was made with.

    The signature, the parameters, copies and pickles stay as they are. A subclass must be decorated itself,
    because its arguments may be others.
    """
    init = cls.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remembering(self, *args, **kwargs) -> None:
        outermost = type(self) is cls
        # Copied first: the body may change what it is given.
        given = (_copied(args), _copied(kwargs)) if outermost else ((), {})
        init(self, *args, **kwargs)
        if outermost:
            bound = signature.bind(self, *given[0], **given[1]).arguments
            record(self, f"{cls.__module__}.{cls.__qualname__}", _by_name(bound, signature))

    cls.__init__ = remembering
    return cls


def _by_name(bound: Mapping[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """Bound arguments without `self`, further keywords under their own names."""
    named = dict(list(bound.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def _copied(value: Any) -> Any:
    """Plain containers of one's own; what is in them stays the same object."""
    if type(value) is dict:
        return {name: _copied(item) for name, item in value.items()}
    return type(value)(_copied(item) for item in value) if type(value) in (list, tuple) else value


def record(made: Any, target: str, arguments: Mapping[str, Any]) -> None:
    """Keep on `made` that it is `target(**arguments)`; an object that can hold no attribute stays without."""
    values = getattr(made, "__dict__", None)
    if isinstance(values, dict):
        values[_ATTRIBUTE] = (target, _copied(dict(arguments)))


def recorded(made: Any) -> tuple[str, dict[str, Any]] | None:
    """(dotted path of what was called, the arguments that it was given), or None where nobody kept them."""
    return getattr(made, "__dict__", {}).get(_ATTRIBUTE)


def arguments_of(made: Any, function: Callable | None = None) -> dict[str, Any]:
    """All arguments of an object, those that were left out at their defaults; ValueError if nobody kept them.

    `function` is what was called, where it is not the object's class.
    """
    found = recorded(made)
    if found is None:
        raise ValueError(f"this {type(made).__name__} does not remember the arguments that it was made with")
    parameters = inspect.signature(function or type(made)).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return defaults | _copied(found[1])
