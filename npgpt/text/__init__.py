"""From a text to ids to batches. No model."""
