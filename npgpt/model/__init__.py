"""The GPT: parameters, layers and the forward pass. No training, no sampling, no files."""
