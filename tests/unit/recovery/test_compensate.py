"""FLAP's compensation where a family has biases, and where it has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paredown import recovery
from paredown.anatomy import describe
from paredown.encoder import admit_biases
from paredown.network import network
from paredown.surgery import cut
from paredown.types import Plan
from tests.contracts.families import CAUSAL_LM, batch, tiny


@pytest.mark.parametrize("family", ("llama", "gpt2", "bert"))
def test_the_mean_of_what_goes_is_kept(family: str) -> None:
    """With constant activations of the removed neurons, nothing is lost; the state loads into a model cut anew."""
    teacher = tiny(family, CAUSAL_LM if family != "bert" else "text-classification")
    anatomy = describe(teacher)
    gone = anatomy.group("layer.1.neurons")
    keep = {**anatomy.identity(), gone.name: tuple(range(2, gone.units))}
    plan = Plan(anatomy.fingerprint, keep)
    inputs = {name: tensor.numpy() for name, tensor in batch(teacher).items()}
    dense = network(teacher, anatomy.layout)
    arguments = {name: torch.from_numpy(array) for name, array in inputs.items()}

    def only_first_two_matter(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0].clone()
        if x.shape[-1] == gone.units:
            x[..., :2] = torch.tensor([0.7, -1.3])
        return (x,)

    projection = teacher.get_submodule(gone.consumer.tensor.removesuffix(".weight"))
    with projection.register_forward_pre_hook(only_first_two_matter):
        small = cut(teacher, anatomy, plan)
        fitted = recovery.recover(
            small, method="compensate", teacher=teacher, anatomy=anatomy, plan=plan, batches=[inputs, inputs]
        )
        wanted = dense(**arguments)
    again = cut(teacher, anatomy, plan)
    state = fitted.state_dict()
    admit_biases(again, state)
    again.load_state_dict(state, strict=True)
    found = network(again, anatomy.layout)
    inner = again.get_submodule(projection_name(teacher, projection))
    inner._forward_pre_hooks.clear()  # the copy of the planted hook: the cut layer has no constant neurons
    torch.testing.assert_close(found(**arguments), wanted, rtol=1e-4, atol=1e-5)
    bare = network(small, anatomy.layout)
    small.get_submodule(projection_name(teacher, projection))._forward_pre_hooks.clear()
    assert np.abs((bare(**arguments) - wanted).detach().numpy()).max() > 1e-3


def projection_name(model: torch.nn.Module, module: torch.nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module)
