"""Convolutions as matrix products, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paredown.graph import trace
from paredown.layers import gram, layers_of

CASES = (
    (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 7)),
    (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 4, 11, 13)),
    (nn.Conv2d(6, 9, 3, groups=3, bias=False), (2, 6, 8, 8)),
    (nn.Conv2d(4, 4, 4, padding="same", groups=4), (2, 4, 9, 9)),
    (nn.Conv1d(4, 6, 3, padding=2), (3, 4, 9)),
    (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 6)),
    (nn.Linear(5, 7), (3, 4, 5)),
)


@pytest.mark.parametrize(("module", "shape"), CASES)
def test_rows_times_matrix_is_the_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    model = trace(nn.Sequential(module.double()), torch.randn(shape, dtype=torch.float64))
    (layer,) = layers_of(model)
    x = torch.randn(5, *shape[1:], dtype=torch.float64)
    weight = model.get_parameter(layer.weight)
    y = layer.rows(x) @ layer.matrix(weight)
    if layer.bias:
        y = y + model.get_parameter(layer.bias).reshape(layer.groups, 1, -1)
    torch.testing.assert_close(y, layer.columns(model(x)))
    assert torch.equal(layer.tensor(layer.matrix(weight), weight), weight)
    found = gram(layer.rows(x))
    assert found.shape[1] == layer.matrix(weight).shape[1] + 1 and found[0, -1, -1] == layer.rows(x).shape[1]
