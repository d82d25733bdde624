"""How runs and models are shown: HTML pages, and files for TensorBoard. Nothing is trained here, and nothing is served."""
