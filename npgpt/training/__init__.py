"""Training: optimiser, loop, events, advice at the end, memory estimates, plans for a given time. Nothing is printed here."""
