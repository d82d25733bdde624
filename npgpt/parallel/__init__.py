"""One training step spread over many processors. No formulas, no files."""
