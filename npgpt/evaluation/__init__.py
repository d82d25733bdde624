"""How good a model is, and how similar its samples are to its training text. No training."""
