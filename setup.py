"""Packaging of megabagel. Install torch first, then `pip install --no-build-isolation -e .`: see pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megabagel" / "__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="megabagel",
    version=VERSION,
    description="Tensor-, pipeline- and data-parallel training of unified multimodal models of the BAGEL family",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megabagel", "megabagel.*"]),
    package_data={"megabagel": ["config/presets/*.yaml"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.17",
        "jsonargparse[signatures]>=4.49",
        "matplotlib",
        "ninja",
        "numpy",
        "pillow",
        "psutil",
        "pyarrow",
        "pybind11",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "tqdm",
        "transformers",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],
        "wandb": ["wandb"],
        "eval": ["nltk", "scipy"],
        "dev": ["hypothesis", "pytest", "pytest-timeout", "ruff"],
    },
)
