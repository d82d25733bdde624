"""Checkpoints and run files on disk: files (atomic writes, lock), archive (bytes, hashes), header (JSON), checkpoint, run."""
