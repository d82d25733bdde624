"""How good a model and its text are. No training."""
