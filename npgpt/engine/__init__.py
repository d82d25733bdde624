"""Arrays that know their gradient: backends, random streams, graph, Tensor, operations, gradient checks. No model."""
