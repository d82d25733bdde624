"""How good a model is, and how like its training text its own text is. No training."""
