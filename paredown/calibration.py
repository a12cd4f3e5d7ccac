"""One streaming pass over calibration texts: everything that scoring and closed-form recovery need to know.

Legend: B batch, T tokens, X inputs of an output projection (heads side by side, or neurons), D model width,
U units, N rows (real tokens; texts alone where only the first row is read).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.errors import UnsupportedModel
from paredown.network import Forward, Network
from paredown.types import Anatomy, Array, Group

Batch = Mapping[str, Array]

PROJECTIONS = {"heads": "output", "neurons": "down"}  # of a layer: its attention's, its FFN's

ACTIVE = 1.0  # an activation above this counts: from here on GELU and SiLU hand through what they are given
SOFTENING = 2.0  # temperature of the sampled answers: a model sure of its own training texts would give no gradient


# What `collect` can be asked for; "head_gram" is the gram of attention alone, which is narrow.
NEEDS = ("gram", "head_gram", "curvature", "moments", "gates", "weight_gradients")


@dataclass(frozen=True)
class Statistics:
    """What one sub-layer sees; None where it was not asked for.

    `gram` [X+1, X+1] float64: sum of x x' over rows, the last entry of x being 1 (for the bias). `curvature` [D, D]
    float64: mean of g g' over rows, g the gradient of a text's loss at the sub-layer's output. `rows` is N.
    `moments` [3, X] float64: over rows, the mean of x, the mean of x^2, and the share above ACTIVE.
    `gates` [2, U] float64: over texts, the mean of |g| and of g^2, g a text's derivative by a gate on a unit.
    `weight_gradients`: by the name of the tensor, the mean over texts of the loss's gradient.
    """

    rows: int
    texts: int
    gram: Array | None = None
    curvature: Array | None = None
    moments: Array | None = None
    gates: Array | None = None
    weight_gradients: Mapping[str, Array] | None = None


def sub_layers(encoder: Network) -> dict[str, nn.Module]:
    """Output projections by group name, bottom-up, of the sub-layers that have any units."""
    table: dict[str, nn.Module] = {}
    for index, layer in enumerate(encoder.layers):
        for kind, role in PROJECTIONS.items():
            if getattr(layer, f"num_{kind}"):
                table[f"layer.{index}.{kind}"] = getattr(layer, role)
    return table


def sub_layer_of(group: Group) -> str:
    """The name under which `sub_layers` has the projection that a group's units feed; query heads feed attention's."""
    return f"layer.{group.layer}.{'neurons' if group.kind == 'neuron' else 'heads'}"


def tensors(batch: Batch, encoder: Forward) -> dict[str, Tensor]:
    """The encoder's inputs out of one padded batch of arrays."""
    return {name: torch.from_numpy(np.ascontiguousarray(batch[name])) for name in encoder.input_names}


def real_rows(values: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T, X] -> [N, X]: padding removed; the rows of [B, 1, X] are the first ones, which are all real."""
    return values.flatten(0, 1) if values.shape[1] == 1 else values[attention_mask.bool()]


def with_ones(rows: Tensor) -> Tensor:
    """[N, X] -> [N, X+1] with a column of ones for the bias."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def ridge_regression(gram: Tensor, cross: Tensor, start: Tensor, *, ridge: float, biased: bool = True) -> Tensor:
    """W [X, D] that minimises tr(W' gram W - 2 W' cross) + r |W - start|^2, r being `ridge` of the mean diagonal.

    `gram` [X, X] and `cross` [X, D] are sums over rows of x x' and x y'. With `biased` the last row of W is a bias,
    which is not drawn to its start. All in float64; nothing to solve for where X is 0.
    """
    width = len(gram) - biased
    gram, cross = gram.clone(), cross.clone()
    if width:
        strength = ridge * gram.diagonal()[:width].mean().clamp(min=1e-12)
        gram.diagonal()[:width] += strength
        cross[:width] += strength * start[:width]
    solved: Tensor = torch.linalg.solve(gram, cross)
    return solved


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; afterwards every part is in the mode in which it was."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def tapped(
    modules: Mapping[str, nn.Module],
    see: Callable[[str, Tensor, Tensor], None],
    before: Callable[[Tensor], None] | None = None,
) -> Iterator[None]:
    """Calls `before(input)` and `see(name, input, output)` whenever one of the modules runs inside the block.

    With gradients on, the inputs seen require them, also in a model all of whose parameters are frozen.
    """

    def prepare(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and not args[0].requires_grad:
            args[0].requires_grad_(True)
        if before:
            before(args[0])

    handles = [module.register_forward_pre_hook(prepare) for module in modules.values()]
    handles += [
        module.register_forward_hook(lambda _m, args, out, name=name: see(name, args[0], out))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe_loss(encoder: Network, output: Tensor, random: np.random.Generator) -> Tensor:
    """A scalar whose gradients g give the Gauss-Newton matrix E[g g'] of the divergence from the model itself.

    The divergence has no gradient at the model itself, so answers are drawn instead: for logits, y ~ softmax and
    -log p(y); for embeddings e, the tangent probe (I - ee')r/|e| with r ~ N(0, I), which gives the matrix of the
    cosine loss. Labels are never needed (Martens 2020, arXiv:1412.1193, section 9). `random` is read text by text, so
    the draws do not depend on how the texts are batched.
    """
    if encoder.output_name == "logits":
        log_p = torch.log_softmax(output / SOFTENING, dim=-1)
        reached = log_p.detach().double().exp().cumsum(dim=1)
        drawn = (reached < reached[:, -1:] * torch.from_numpy(random.random((len(output), 1)))).sum(1, keepdim=True)
        return -log_p.gather(1, drawn).sum()
    norm = output.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    unit = output.detach() / norm
    noise = torch.from_numpy(random.standard_normal(output.shape)).to(output.dtype)
    tangent: Tensor = (noise - unit * (unit * noise).sum(-1, keepdim=True)) / norm
    return (tangent * output).sum()


def task_loss(encoder: Network, output: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy of a batch's own labels, where they are to count instead of the model's
    answers: [B] classes, or the next token of every real token [N], -100 where there is none.
    """
    return F.cross_entropy(output, labels, reduction="sum")


def collect(
    encoder: Network,
    anatomy: Anatomy,
    batches: Iterable[Batch],
    needs: Collection[str],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Statistics]:
    """The statistics asked for (see NEEDS) of every sub-layer, by group name.

    Cost: one forward pass over the batches, and a backward pass for all but gram and moments. Memory: what autograd
    keeps of one batch, and the sums: it does not grow with the number of texts. Gradients are those of `probe_loss`,
    or of `task_loss` for batches that hold `labels`. Raises UnsupportedModel when activations are not finite.
    """
    if set(needs) - set(NEEDS):
        raise ValueError(f"statistics are {', '.join(NEEDS)}; not {', '.join(sorted(set(needs) - set(NEEDS)))}")
    modules = sub_layers(encoder)
    groups = {group.name: group for group in anatomy.groups if sub_layer_of(group) in modules}
    owners: dict[str, list[str]] = {}  # of each sub-layer, the groups that own its inputs, each in its own way
    for name, group in groups.items():
        owners.setdefault(sub_layer_of(group), []).append(name)
    units = {name: torch.from_numpy(group.consumer.positions) for name, group in groups.items()}
    sums: dict[tuple[str, str], Tensor] = {}
    rows = dict.fromkeys(modules, 0)
    texts = 0
    random = np.random.default_rng(seed)
    mask = torch.empty(0)
    backward = not set(needs) <= {"gram", "head_gram", "moments"}
    multiplied = [name for name in modules if "gram" in needs or ("head_gram" in needs and name.endswith(".heads"))]
    lowest: list[Tensor] = []  # the input of the first module of a pass: every other one depends on it

    def add(what: str, name: str, value: Tensor) -> None:
        key = what, name
        sums[key] = sums[key].add_(value) if key in sums else value.double()

    def see(name: str, x: Tensor, out: Tensor) -> None:
        values = x.detach()
        real = real_rows(values, mask)
        rows[name] += len(real)
        if name in multiplied:
            z = with_ones(real)  # one batch's products in the model's precision, twice as fast; their sum in float64
            add("gram", name, z.T @ z)
        if "moments" in needs:
            add("moments", name, torch.stack([real.sum(0), real.square().sum(0), (real > ACTIVE).sum(0)]))
        if "gates" in needs:
            x.register_hook(lambda g: gate(owners[name], (values * g).sum(1)))
        if "curvature" in needs:
            out.register_hook(lambda g: bend(name, real_rows(g, mask)))

    def gate(names: Sequence[str], by_input: Tensor) -> None:
        for name in names:
            by_unit = by_input.double()[:, units[name]].sum(2)
            add("gates", name, torch.stack([by_unit.abs().sum(0), by_unit.square().sum(0)]))

    def bend(name: str, g: Tensor) -> None:
        add("curvature", name, g.T @ g)

    def see_weights(name: str, x: Tensor, out: Tensor) -> None:
        values = x.detach().flatten(0, -2)
        out.register_hook(lambda g: learn(name, values, g.flatten(0, -2)))

    def learn(name: str, x: Tensor, g: Tensor) -> None:
        owner = encoder.model.get_submodule(name)
        add("weight", f"{name}.weight", g.T @ x if isinstance(owner, nn.Linear) else x.T @ g)
        add("weight", f"{name}.bias", g.sum(0))

    def first(x: Tensor) -> None:
        if backward and not lowest:
            lowest.append(x)

    linears = {}
    if "weight_gradients" in needs:
        names = dict.fromkeys(part.tensor.rpartition(".")[0] for group in groups.values() for part in group.slices)
        linears = {name: encoder.model.get_submodule(name) for name in names}
    with (
        tapped(linears, see_weights, first),
        tapped(modules, see, first),
        evaluating(encoder.model),
        torch.set_grad_enabled(backward),
    ):
        for batch in batches:
            inputs = tensors(batch, encoder)
            mask = inputs["attention_mask"]
            output = encoder(**inputs)
            if not torch.isfinite(output).all():
                raise UnsupportedModel("The model's outputs on the calibration texts are not finite numbers.")
            if backward and lowest:
                labels = torch.from_numpy(batch["labels"]) if "labels" in batch else None
                loss = probe_loss(encoder, output, random) if labels is None else task_loss(encoder, output, labels)
                # asked for the lowest input alone, autograd passes the hooks of all and keeps none of their gradients
                torch.autograd.grad(loss, lowest)
                lowest.clear()
            texts += len(mask)
            if progress:
                progress(len(mask))

    def mean(what: str, name: str, count: int) -> Array | None:
        return (sums[what, name] / count).numpy() if (what, name) in sums else None

    def weight_gradients(group: Group) -> dict[str, Array]:
        found = {part.tensor: mean("weight", part.tensor, texts) for part in group.slices}
        return {name: value for name, value in found.items() if value is not None}

    return {
        name: Statistics(
            rows=rows[sub_layer_of(group)],
            texts=texts,
            gram=mean("gram", sub_layer_of(group), 1),
            curvature=mean("curvature", sub_layer_of(group), rows[sub_layer_of(group)]),
            moments=mean("moments", sub_layer_of(group), rows[sub_layer_of(group)]),
            gates=mean("gates", name, texts),
            weight_gradients=weight_gradients(group) if linears else None,
        )
        for name, group in groups.items()
        if texts
    }


def divergence(encoder: Network, reference: Network, batches: Iterable[Batch]) -> float:
    """What separates the outputs, KL(reference || encoder) of logits or 1 - cosine of embeddings: mean over texts, or
    over the tokens of a language model.
    """
    total, rows = 0.0, 0
    with torch.inference_mode(), evaluating(encoder.model, reference.model):
        for batch in batches:
            inputs = tensors(batch, encoder)
            found = distance(encoder(**inputs), reference(**inputs), encoder.output_name)
            total, rows = total + float(found.sum()), rows + len(found)
    return total / max(rows, 1)


def distance(output: Tensor, wanted: Tensor, output_name: str) -> Tensor:
    """[B]: KL(wanted || output) for logits, 1 - cosine for embeddings; differentiable in `output`. B counts tokens in
    a language model.
    """
    if output_name == "logits":
        log_p, log_q = output.log_softmax(-1), wanted.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return 1 - torch.cosine_similarity(output, wanted, dim=-1)
