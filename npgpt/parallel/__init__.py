"""One training step spread over threads or processes, and facts of this machine: cores, memory, BLAS. No formulas."""
