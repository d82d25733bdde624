"""Pictures of runs and models: HTML pages that need nothing else. Nothing is trained here, and nothing is served."""
