"""Arrays that know their gradient: backends, graph, Tensor, operations, gradient checks. No parameters and no model."""
