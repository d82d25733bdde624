"""Talking to a person: flags, messages, progress, signals. Only commands/ and cli.py use this room."""
