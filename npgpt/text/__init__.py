"""From a text to ids to batches: tokenizers, reading files, datasets. No model."""
