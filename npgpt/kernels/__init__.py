"""The arithmetic of every operation, on plain arrays. No Tensors, no graph, no parameters."""
