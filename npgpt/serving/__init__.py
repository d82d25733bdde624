"""Serves a model, and the reports of runs, over HTTP. Nothing is trained here."""
