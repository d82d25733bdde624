"""From a model to text. No training."""
