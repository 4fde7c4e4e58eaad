"""How many sampled digits does a classifier that never saw them name right?

    python benchmarks/digits_accuracy.py out/quickstart

A support vector machine is trained on the 5,000 real MNIST digits (its own five-fold accuracy is printed
too) and names every `NNNNN-<digit>.png` of the folder.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from ldm.data import Digits
from ldm.data.images.grid import to_uint8


def as_features(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, 32, 32) -> float (N, 784): the inner 28x28, which hold the digit."""
    return pixels[:, 2:-2, 2:-2].reshape(len(pixels), -1) / 255.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where sample.py wrote its PNGs")
    folder = parser.parse_args().folder
    files = sorted(folder.glob("[0-9]*-[0-9].png"))
    if not files:
        raise SystemExit(
            f"error: {folder} holds no files like 00000-7.png; run sample.py on the digits first"
        )
    digits = Digits(size=32, channels=1, validation=0)
    batch = digits.__getitems__(list(range(len(digits))))
    real, labels = as_features(to_uint8(batch["image"])), batch["label"].numpy()
    classifier = SVC(C=5.0, gamma=0.02)
    folds = cross_val_score(classifier, real, labels, cv=5)
    classifier.fit(real, labels)
    sampled = as_features(np.stack([np.asarray(Image.open(file).convert("L")) for file in files]))
    asked = np.array([int(file.stem.split("-")[1]) for file in files])
    named = classifier.predict(sampled)
    for file, is_named in zip(files, named, strict=True):
        if int(file.stem.split("-")[1]) != is_named:
            print(f"{file.name} was named {is_named}")
    print(f"classifier on real digits it had not seen: {folds.mean():.1%}")
    print(f"samples named as asked: {(named == asked).sum()} of {len(files)}")


if __name__ == "__main__":
    main()
