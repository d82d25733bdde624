"""The package's metadata: name, dependencies, extras, commands. Tools are configured in pyproject.toml."""

import hashlib
import os
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "npgpt" / "__init__.py").read_text(encoding="utf-8")).group(1)

# The platforms for which NVIDIA publishes its compiler.
WITH_NVRTC = "platform_system != 'Darwin' and platform_machine in 'x86_64 AMD64 aarch64'"
BPE = ["tokenizers>=0.20"]
GGUF = ["gguf>=0.17"]
PLOT = ["matplotlib>=3.7"]
SERVE = ["starlette>=0.40", "uvicorn>=0.30", "prometheus-client>=0.20"]
TENSORBOARD = ["tensorboardX>=2.6"]
# mpich's package is a whole MPI, with mpiexec; there is none for Windows.
WITH_MPICH = "platform_system != 'Windows' and platform_machine in 'x86_64 aarch64 arm64'"
MPI = ["mpi4py>=4", f"mpich>=4.2; {WITH_MPICH}"]
BROWSER = ["openai>=1.40", "playwright>=1.45"]
TEST = ["pytest>=8", "hypothesis>=6", "pytest-timeout>=2", "pytest-xdist>=3", "ml_dtypes>=0.5", "zstandard>=0.19", *BPE, *GGUF]
TEST += [*PLOT, *SERVE, *TENSORBOARD, *BROWSER, *MPI]

# `make oldest` runs the tests with exactly these versions. threadpoolctl 3.4 does not find the BLAS of NumPy's own packages.
CORE = ["numpy>=2.0", "threadpoolctl>=3.5", "tqdm>=4.60"]

NATIVE = ROOT / "npgpt" / "kernels" / "native"
NATIVE_SOURCES = sorted(path for path in NATIVE.iterdir() if path.suffix in (".c", ".h"))


def native():
    """The kernels in C. Without a compiler they are left out, and NumPy computes everything. So they are on Windows."""
    if sys.platform == "win32" or os.environ.get("NPGPT_NATIVE") == "0":
        return []
    hashed = hashlib.sha256(b"".join(path.read_bytes() for path in NATIVE_SOURCES)).hexdigest()[:16]
    return [
        Extension(
            "npgpt.kernels.native._native",
            sources=[str(path.relative_to(ROOT)) for path in NATIVE_SOURCES if path.name.startswith("processors_")],
            depends=[str(path.relative_to(ROOT)) for path in NATIVE_SOURCES],
            define_macros=[("SOURCES", f'"{hashed}"')],  # library.py does not load a library of other sources
            extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"],
            libraries=["m"],
            optional=True,
        )
    ]


setup(
    name="npgpt",
    version=VERSION,
    description="A GPT built from NumPy: its own autograd engine, transformer, training and generation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["npgpt", "npgpt.*"]),
    package_data={"npgpt": ["py.typed", "kernels/cuda/*.cu", "kernels/native/*.[ch]", "report/assets/*"]},
    ext_modules=native(),
    install_requires=CORE,
    extras_require={
        "cuda12": ["cupy-cuda12x[ctk]>=14", "ml_dtypes>=0.5", "numpy>=2.1.2"],
        "cuda13": ["cupy-cuda13x[ctk]>=14", "ml_dtypes>=0.5", "numpy>=2.1.2"],
        "nvrtc": [f"nvidia-cuda-nvrtc>=13; {WITH_NVRTC}"],
        "bpe": BPE,
        "gguf": GGUF,
        "mpi": MPI,
        "plot": PLOT,
        "serve": SERVE,
        "tensorboard": TENSORBOARD,
        "zstd": ["zstandard>=0.19; python_version < '3.14'"],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.9", "mypy>=1.13"],
        "oldest": [requirement.replace(">=", "==") for requirement in CORE],
        "parity": ["torch>=2.6"],
    },
    entry_points={"console_scripts": ["npgpt = npgpt.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
