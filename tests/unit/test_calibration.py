"""Statistics against loops and hand computations. Legend: B texts, T tokens, X inputs, D width, C classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paredown.anatomy import describe
from paredown.calibration import (
    ACTIVE,
    Statistics,
    collect,
    distance,
    divergence,
    evaluating,
    probe_loss,
    sub_layers,
    task_loss,
    tensors,
)
from paredown.encoder import Encoder
from paredown.errors import UnsupportedModel
from paredown.surgery import cut
from paredown.types import Plan
from tests.contracts.families import FAMILIES, batch, tiny

LENGTHS = (9, 6, 4, 1)


def example(family: str = "bert", task: str = "text-classification", **about: Any) -> tuple[Encoder, dict[str, Any]]:
    model = tiny(family, task)
    inputs = {name: tensor.numpy() for name, tensor in batch(model, lengths=LENGTHS).items()}
    return Encoder(model, describe(model, **about).layout), inputs


def collected(encoder: Encoder, batches: list[dict[str, Any]], *needs: str, **about: Any) -> dict[str, Statistics]:
    return collect(encoder, describe(encoder.model), batches, needs, **about)  # type: ignore[arg-type]


def seen(encoder: Encoder, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The input [B, T, X] of every output projection, found without any hook of the module under test."""
    found: dict[str, Tensor] = {}
    last = len(encoder.layers) - 1
    with torch.no_grad():
        x = encoder.embed(inputs["input_ids"], inputs.get("token_type_ids"))
        mask = encoder.mask(x, inputs["attention_mask"])
        for i, layer in enumerate(encoder.layers):
            first = encoder.layout.pooling == "cls" and i == last
            found[f"layer.{i}.heads"] = layer.context(x, mask, first)
            found[f"layer.{i}.neurons"] = layer.hidden(layer.attend(x, mask, first))
            x = encoder.step(i, x, mask)
    return found


@pytest.mark.parametrize("pooling", ("cls", "mean"))
@pytest.mark.parametrize("family", FAMILIES)
def test_gram_is_the_sum_over_real_rows(family: str, pooling: str) -> None:
    encoder, arrays = example(family, "text-embedding", pooling=pooling)
    found = collected(encoder, [arrays, arrays], "gram")
    for name, values in seen(encoder, tensors(arrays, encoder)).items():
        only_first = pooling == "cls" and name.startswith("layer.2")
        gram = np.zeros((values.shape[2] + 1,) * 2)
        for text, length in enumerate(LENGTHS):
            for token in range(1 if only_first else length):
                x = np.append(values[text, token].double().numpy(), 1.0)
                gram += 2 * np.outer(x, x)
        assert found[name].rows == 2 * (4 if only_first else sum(LENGTHS)) and found[name].texts == 8
        np.testing.assert_allclose(found[name].gram, gram, rtol=1e-4, atol=1e-4)
        assert found[name].gram.dtype == np.float64 and found[name].gram[-1, -1] == found[name].rows
        assert found[name].curvature is None and found[name].gates is None


@pytest.mark.parametrize("pooling", ("cls", "mean"))
def test_moments_are_means_over_real_rows(pooling: str) -> None:
    encoder, arrays = example("bert", "text-embedding", pooling=pooling)
    found = collected(encoder, [arrays, arrays], "moments")
    real = arrays["attention_mask"].astype(bool)
    for name, values in seen(encoder, tensors(arrays, encoder)).items():
        rows = values[:, 0] if values.shape[1] == 1 else values[torch.from_numpy(real)]
        x = rows.double().numpy()
        expected = np.stack([x.mean(0), np.square(x).mean(0), (x > ACTIVE).mean(0)])
        np.testing.assert_allclose(found[name].moments, expected, rtol=1e-4, atol=1e-6)
        assert found[name].gram is None


@pytest.mark.parametrize("labelled", (False, True))
@pytest.mark.parametrize("task", ("text-classification", "text-embedding"))
@pytest.mark.parametrize("family", ("bert", "mpnet"))
def test_gradients_equal_a_loop_over_texts(family: str, task: str, labelled: bool) -> None:
    """Each text alone, each gate a real variable (output = projection(gate * input)), each weight a leaf."""
    if labelled and task == "text-embedding":
        pytest.skip("embeddings have no labels")
    encoder, arrays = example(family, task)
    arrays = arrays | ({"labels": np.array([2, 0, 1, 1])} if labelled else {})
    found = collected(encoder, [arrays], "gates", "weight_gradients", seed=7)
    random = np.random.default_rng(7)  # read text by text, so the loop draws what the batch drew
    anatomy = describe(encoder.model)  # type: ignore[arg-type]
    by_unit: dict[str, list[Any]] = {name: [] for name in found}
    encoder.model.requires_grad_(True)
    encoder.model.zero_grad()
    for text, length in enumerate(LENGTHS):
        inputs = {name: tensor[text : text + 1, :length] for name, tensor in tensors(arrays, encoder).items()}
        gates = {name: torch.ones(linear.in_features, requires_grad=True) for name, linear in linears(encoder).items()}
        handles = [
            linear.register_forward_pre_hook(lambda _m, args, gate=gates[name]: (args[0] * gate,))
            for name, linear in linears(encoder).items()
        ]
        output = encoder(**inputs)
        label = torch.tensor(arrays["labels"][text : text + 1]) if labelled else None
        loss = probe_loss(encoder, output, random) if label is None else task_loss(encoder, output, label)
        loss.backward()
        for handle in handles:
            handle.remove()
        for name, gate in gates.items():
            assert gate.grad is not None
            by_unit[name].append(gate.grad.numpy()[anatomy.group(name).consumer.positions].sum(1))
    parameters = dict(encoder.model.named_parameters())
    for name, one in found.items():
        rows = np.stack(by_unit[name])
        np.testing.assert_allclose(one.gates[0], np.abs(rows).mean(0), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(one.gates[1], np.square(rows).mean(0), rtol=4e-3, atol=1e-5)
        assert one.weight_gradients is not None
        assert set(one.weight_gradients) == {part.tensor for part in anatomy.group(name).slices}
        for tensor, gradient in one.weight_gradients.items():
            expected = parameters[tensor].grad
            assert expected is not None
            np.testing.assert_allclose(gradient, expected / len(LENGTHS), rtol=5e-3, atol=1e-5, err_msg=tensor)


def linears(encoder: Encoder) -> dict[str, nn.Linear]:
    return sub_layers(encoder)  # type: ignore[return-value]


def test_curvature_is_the_mean_square_of_the_gradient_at_the_output() -> None:
    encoder, arrays = example()
    found = collected(encoder, [arrays], "curvature", seed=2)
    inputs = tensors(arrays, encoder)
    for name, linear in linears(encoder).items():
        shift = torch.zeros(4, 1 if name.startswith("layer.2") else 9, 24, requires_grad=True)
        handle = linear.register_forward_hook(lambda _m, _args, out, shift=shift: out + shift)
        probe_loss(encoder, encoder(**inputs), np.random.default_rng(2)).backward()
        handle.remove()
        rows = shift.grad.reshape(-1, 24).double().numpy()  # padding has no gradient
        np.testing.assert_allclose(found[name].curvature, rows.T @ rows / found[name].rows, rtol=1e-3, atol=1e-6)


def test_a_model_that_was_cut() -> None:
    model = tiny("bert")
    anatomy = describe(model)
    keep = {**anatomy.identity(), "layers": (0, 2), "layer.0.neurons": (), "layer.2.heads": (1,)}
    small = cut(model, anatomy, Plan(anatomy.fingerprint, keep))
    arrays = {name: tensor.numpy() for name, tensor in batch(model).items()}
    found = collected(Encoder(small, anatomy.layout), [arrays], "gram", "gates")
    sizes = {name: (one.gram.shape, one.gates.shape) for name, one in found.items()}  # type: ignore[union-attr]
    assert sizes == {
        "layer.0.heads": ((25, 25), (2, 4)),
        "layer.1.heads": ((7, 7), (2, 1)),
        "layer.1.neurons": ((21, 21), (2, 20)),
    }


def test_what_cannot_be_collected_is_named() -> None:
    encoder, arrays = example()
    with pytest.raises(ValueError, match="not hessian"):
        collected(encoder, [arrays], "gram", "hessian")


def test_a_model_that_overflows_is_named() -> None:
    encoder, arrays = example()
    encoder.layers[1].up.weight.data.fill_(float("inf"))
    with pytest.raises(UnsupportedModel, match="not finite"):
        collected(encoder, [arrays], "gram")


def test_progress_counts_texts() -> None:
    encoder, arrays = example()
    told: list[int] = []
    collected(encoder, [arrays, arrays], "gram", progress=told.append)
    assert told == [4, 4]


# --------------------------------------------------------------------------------------------------------- the probes


@pytest.mark.parametrize("normalize", (False, True))
def test_embedding_probe_is_the_gauss_newton_matrix_of_the_cosine_loss(normalize: bool) -> None:
    """E[g g'] at the output against the Hessian of 1 - cos(e, e0) at e = e0, by automatic differentiation."""
    encoder, _ = example("bert", "text-embedding", normalize=normalize)
    wanted = torch.randn(6, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda e: 1 - torch.cosine_similarity(e, wanted, dim=0), wanted)
    output = wanted.repeat(200_000, 1).requires_grad_()
    (g,) = torch.autograd.grad(probe_loss(encoder, output, np.random.default_rng(0)), output)
    torch.testing.assert_close(g.T @ g / len(g), hessian, rtol=0, atol=0.01 * float(hessian.abs().max()))


def test_logit_probe_is_the_fisher_matrix_of_the_softened_softmax() -> None:
    """diag(p) - pp', over the squared temperature."""
    encoder, _ = example()
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    p = (logits / 2).softmax(0)
    expected = (torch.diag(p) - torch.outer(p, p)) / 4
    output = logits.repeat(200_000, 1).requires_grad_()
    (g,) = torch.autograd.grad(probe_loss(encoder, output, np.random.default_rng(0)), output)
    torch.testing.assert_close(g.T @ g / len(g), expected, rtol=0, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("task", ("text-classification", "text-embedding"))
def test_draws_do_not_depend_on_batches(task: str) -> None:
    encoder, _ = example("bert", task)
    output = torch.randn(12, 5)
    grads = []
    for parts in ((12,), (3, 1, 8)):
        random = np.random.default_rng(4)
        leaves = [part.clone().requires_grad_() for part in output.split(parts)]
        grads.append(torch.cat([torch.autograd.grad(probe_loss(encoder, leaf, random), leaf)[0] for leaf in leaves]))
    torch.testing.assert_close(*grads)


# ---------------------------------------------------------------------------------------------------------- distances


def test_distance_is_kullback_leibler_or_cosine() -> None:
    ours, theirs = torch.randn(3, 4), torch.randn(3, 4)
    p, q = ours.softmax(1), theirs.softmax(1)
    torch.testing.assert_close(distance(ours, theirs, "logits"), (q * (q / p).log()).sum(1))
    cosine = (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1))
    torch.testing.assert_close(distance(ours, theirs, "embeddings"), 1 - cosine)


def test_divergence_is_a_mean_over_texts() -> None:
    encoder, arrays = example()
    other = Encoder(tiny("bert", seed=1), encoder.layout)
    one = {name: array[:1] for name, array in arrays.items()}
    whole, first = divergence(encoder, other, [arrays]), divergence(encoder, other, [one])
    assert divergence(encoder, other, [arrays, one]) == pytest.approx((4 * whole + first) / 5, rel=1e-4)
    assert divergence(encoder, encoder, [arrays]) == pytest.approx(0, abs=1e-6)


def test_evaluating_gives_every_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise RuntimeError
    assert [part.training for part in model.modules()] == [True, True, False, False]
