"""Training methods: one file a method, registered here once."""

from typing import Any

from ldm.config.signatures import resolve_target
from ldm.wording import did_you_mean

#: What `task:` in a YAML may say, and the class that it means.
METHODS = {
    "autoencoder": "ldm.training.methods.autoencoder.AutoencoderMethod",
    "diffusion": "ldm.training.methods.diffusion.DiffusionMethod",
    "classifier": "ldm.training.methods.classifier.ClassifierMethod",
}


def find_method(task: Any) -> type:
    """The `Method` of a task: a registered name, or the dotted path of a class of one's own.

    Raises:
        ValueError: neither of these.
    """
    known = isinstance(task, str) and task in METHODS
    if not known and not (isinstance(task, str) and "." in task):
        hint = did_you_mean(task, METHODS) if isinstance(task, str) else ""
        raise ValueError(
            f"must be one of {', '.join(METHODS)} or the dotted path of a class, got {task!r}{hint}"
        )
    found = resolve_target(METHODS.get(task, task), allow_foreign=True)
    from ldm.training.method import Method

    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{task} is no ldm.training.method.Method")
    return found
