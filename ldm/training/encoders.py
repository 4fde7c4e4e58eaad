"""Weights that a conditioner's encoders begin with."""

import logging
from pathlib import Path

from ldm.checkpoints import load, native
from ldm.conditioning import Conditioner
from ldm.weights.reading import read_weights

log = logging.getLogger(__name__)


def load_encoders(conditioner: Conditioner) -> None:
    """Give every embedder with a `weights` path (an `ImageEmbedder`'s) the weights that lie there.

    Raises:
        ValueError: nothing is there, it does not fit, or an encoder that is not trained has none.
    """
    for embedder in conditioner.embedders:
        source = getattr(embedder, "weights", None)
        if source is None and not getattr(embedder, "trainable", True):
            raise ValueError(
                f"conditioner: the encoder of the {type(embedder).__name__} is not trained and has no "
                "weights: what it makes of an image would mean nothing. Give its `weights` (the run folder "
                "of a classifier, or a file), or train it too with trainable: true"
            )
        if source is None:
            continue
        path = Path(source)
        if not path.exists():
            raise ValueError(
                f"conditioner: weights {path} of the {type(embedder).__name__} do not exist; give a run "
                "folder or a file"
            )
        tensors = load(path).state_dict() if native.is_run_folder(path) else read_weights(path).tensors
        try:
            embedder.take_weights(tensors)
        except ValueError as error:
            raise ValueError(f"conditioner: weights {path}: {error}") from error
        log.info("%s: weights of %s", type(embedder).__name__, path)
