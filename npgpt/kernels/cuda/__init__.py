"""The kernels for an NVIDIA GPU: CUDA sources, launches, products. reference.py and updates.py define what they compute."""
