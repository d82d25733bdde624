"""From a text to a trained model: the optimiser, the loop, memory, the plan. Nothing is printed here."""
