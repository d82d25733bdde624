"""The kernels for an NVIDIA GPU: CUDA sources, launches, matrix products. reference.py defines what they compute."""
