"""The GPT: parameters, layers, KV cache and the forward pass. No training, no sampling, no files."""
