"""Layers by themselves: a convolution is the matrix product that im2col makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from paredown.errors import UnsupportedModel
from paredown.sparsity import Pattern, matrix, solve_module
from paredown.sparsity._module import _rows, gram_of

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "same": {"padding": "same"},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "dilated": {"dilation": 2, "padding": (2, 1)},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 8},
    "flat": {"kernel_size": (1, 3)},
}


def correlated(*shape: int) -> torch.Tensor:
    """Inputs whose channels have much in common."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(shape[0], 1, *shape[2:], generator=generator)
    return common + 0.5 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_im2col_is_the_convolution(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(8, 16, **{"kernel_size": 3, "bias": False, **CONVOLUTIONS[name]}).double()
    x = correlated(3, 8, 9, 7).double()
    rows = _rows(module, x)
    parts = matrix(module).chunk(module.groups)
    found = torch.cat([own @ part.T for own, part in zip(rows, parts, strict=True)], dim=1)
    wanted = module(x).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(found, wanted, atol=1e-10)
    once, twice = gram_of(module, [x]), gram_of(module, [x[:1], x[1:]])
    assert torch.allclose(once, twice) and torch.allclose(once[0], rows[0].T @ rows[0])


@pytest.mark.parametrize("name", ["plain", "strided", "grouped", "depthwise"])
@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt", "alps", "random"])
def test_exactly_so_many_zeros(name: str, solver: str) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(8, 16, **{"kernel_size": 3, **CONVOLUTIONS[name]})
    solve_module(module, [correlated(4, 8, 9, 7)], 0.5, Pattern(), solver)
    for part in matrix(module).chunk(module.groups):
        assert int((part == 0).sum()) == round(part.numel() / 2)


@pytest.mark.parametrize("kind", ["conv", "grouped", "linear", "conv1d"])
def test_the_brain_surgeon_loses_less_than_magnitude(kind: str) -> None:
    torch.manual_seed(0)
    modules: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "conv": (nn.Conv2d(8, 16, 3, padding=1), correlated(4, 8, 9, 7)),
        "grouped": (nn.Conv2d(8, 16, 3, groups=2), correlated(4, 8, 9, 7)),
        "linear": (nn.Linear(24, 16), correlated(100, 24)),
        "conv1d": (Conv1D(16, 24), correlated(100, 24)),
    }
    module, x = modules[kind]
    dense, state = module(x).detach(), {k: v.clone() for k, v in module.state_dict().items()}
    lost = {}
    for solver in ("magnitude", "wanda", "sparsegpt"):
        module.load_state_dict(state)
        solve_module(module, [x], 0.6, Pattern(), solver)
        lost[solver] = float((module(x) - dense).square().mean().detach())
    assert lost["sparsegpt"] < 0.9 * min(lost["magnitude"], lost["wanda"])


@pytest.mark.parametrize("module", [nn.Conv1d(4, 6, 3, padding=1), nn.Conv3d(2, 4, 3, padding="same")])
def test_convolutions_of_one_and_three_dimensions(module: nn.Conv1d | nn.Conv3d) -> None:
    x = correlated(2, module.in_channels, *(5,) * len(module.kernel_size))
    dense = module(x).detach()
    solve_module(module, [x], 0.5, Pattern(), "sparsegpt")
    assert int((module.weight == 0).sum()) == module.weight.numel() // 2
    assert float((module(x) - dense).square().mean().detach()) < 0.5 * float(dense.var())


def test_patterns_of_a_convolution() -> None:
    torch.manual_seed(0)
    module, x = nn.Conv2d(8, 16, 3), correlated(4, 8, 9, 7)
    solve_module(module, [x], 0.5, Pattern.parse("2:4"), "sparsegpt")
    assert Pattern.parse("2:4").holds(matrix(module))
    with pytest.raises(UnsupportedModel, match="2 x 9 does not divide into 2:4"):
        solve_module(nn.Conv2d(8, 16, 3, groups=8), [x], 0.5, Pattern.parse("2:4"), "magnitude")
    with pytest.raises(UnsupportedModel, match="not in LayerNorm"):
        solve_module(nn.LayerNorm(3), [], 0.5, Pattern(), "magnitude")
