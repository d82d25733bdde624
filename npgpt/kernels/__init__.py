"""The numerical work of every operation, on plain arrays; no Tensors and no graph here."""
