"""A model, and reports of runs, over HTTP. Answers what it is asked; never trains."""
