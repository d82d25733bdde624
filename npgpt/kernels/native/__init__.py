"""The operations of a CPU in C. They are optional: without a C compiler, NumPy computes them."""
