"""Checkpoints and the files of a run on disk. Nothing is trained and nothing is printed here."""
