"""The commands, one in each file. `parser()` makes the command-line parser; `run(args)` does the work, returns the status."""
