"""The commands, one in each file. `parser()` makes the command-line parser; `run(args)` returns the exit status."""
