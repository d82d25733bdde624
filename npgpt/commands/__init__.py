"""The commands, a file for each subject: `parser()` says what a command line may be, and a function runs it."""
