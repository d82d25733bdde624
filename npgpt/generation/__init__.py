"""From a model to text: next-token logits, sampling, stop texts. No training."""
