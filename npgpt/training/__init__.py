"""From a text to a trained model: optimiser, loop, memory, plan. Nothing is printed here."""
