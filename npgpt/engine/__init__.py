"""Arrays that know their gradient: backends, the graph, Tensor, operations, gradient checks. No parameters, no model."""
