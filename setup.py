"""Packaging: `grpo_core`, and its kernels through the link grpo_core/kernels -> ../kernels."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "grpo_core/__init__.py").read_text())
assert version is not None

setup(
    name="grpo_core",
    version=version.group(1),
    description="The loss core of GRPO-style reinforcement learning, in one pass over the logits",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["grpo_core", "grpo_core.*"]), "grpo_core.kernels"],
    package_data={"grpo_core": ["py.typed"]},
    entry_points={
        "vllm.general_plugins": ["grpo_core = grpo_core.trainer.vllm.folder:register"],
    },
    install_requires=[
        "torch>=2.9",
        # 3.6 interprets kernels, as the tests do without a GPU, only beside numpy < 2.4
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5",
        # the LLVM of 0.61 cannot compile a maximum that keeps NaN, and ends the process
        "numba>=0.62",
    ],
    extras_require={
        "train": ["matplotlib", "rich"],
        "data": ["datasets"],
        "lora": ["peft"],
        "tasks": ["math-verify", "reasoning-gym"],
        "vllm": ["vllm>=0.28"],
        "ray": ["ray"],
        "trl": ["trl>=1.15,<1.17"],
        "bench": ["pytest", "pytest-benchmark"],
        "test": [
            "build",
            "hypothesis",
            "math-verify",
            "matplotlib",
            "mypy",
            "peft",
            "pytest",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "ray",
            "reasoning-gym",
            "rich",
            "ruff",
            "setuptools",
            "trl==1.16.0",
            "wheel",
        ],
    },
)
