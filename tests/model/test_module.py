"""Modules: parameters are found wherever they are kept, under names that say where."""

import numpy as np

from npgpt import Tensor
from npgpt.model.layers import Linear
from npgpt.model.module import Module, Parameters


def parameter(value=1.0):
    return Tensor([value], requires_grad=True)


def test_parameters_in_containers_are_found():
    class Model(Module):
        def __init__(self):
            self.single = parameter()
            self.listed = [parameter(), Linear(2, 2)]
            self.tuple = (parameter(),)
            self.named = {"a": parameter(), "b": [Linear(1, 1, bias=False)]}
            self.constant = Tensor([1.0])
            self.size = 3

    model = Model()
    expected = ["single", "listed.0", "listed.1.weight", "listed.1.bias", "tuple.0", "named.a", "named.b.0.weight"]
    assert [name for name, _ in model.named_parameters()] == expected
    model.flatten_parameters()
    assert isinstance(model.parameters(), Parameters)
    assert model.flat.data.size == 1 + 1 + 4 + 2 + 1 + 1 + 1
    assert [name for name, _ in model.named_parameters()] == expected  # the flat list itself is not searched
    np.testing.assert_array_equal(model.state_dict()["named.a"], [1.0])
