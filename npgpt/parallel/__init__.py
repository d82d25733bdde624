"""One training step spread over many processors: threads, processes, the BLAS. No formulas, no files."""
