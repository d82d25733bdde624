"""The operations of a CPU in C, for those who have a C compiler. Nothing here is needed: without it, NumPy computes them."""
