"""The stages of a token policy as ONNX nodes between the layers of an export.

The graph stays padded. Every text keeps its own number of tokens, and a stage shortens the batch to the most of them:
TopK ranks the scores, the tokens of the highest ones are gathered in their old order, a new mask hides the rest. With
the padding below all scores and special tokens above, one TopK serves every rule. The numbers of a ratio or a quantile
are looked up in a table by a text's length, since a runtime may count in 32 bits and compute shares in float32.

With `off_below`, a batch of short texts alone skips the stages: they stand in an If, whose other branch passes all on.

A scorer is traced from its own code. It reads what the layers before the stage compute anyway.

Legend: B batch, T tokens before a stage, L after it, D model width, H heads, K head size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from paredown.errors import UnsupportedModel
from paredown.targets._lean import KEYS, OUTPUT, WEIGHTS, Flow, Writer
from paredown.targets._trace import TOKENS, prefix, trace
from paredown.types import Array, TokenPolicy, TokenStage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paredown.encoder import Encoder

METADATA = "paredown.tokens"  # key of the model's metadata under which the policy lies
SIZE, BIAS = "glue.size", "stem.bias"  # the int64 shape (B, T) of the inputs; the position bias [H, T, T]
POOLED = "tail.stream"
HUGE = float(np.finfo(np.float32).max)  # behind what is hidden, as in `Encoder.mask`


class TokenPruned(Protocol):
    """An encoder with a token policy, as `paredown.tokens.Packed` is one."""

    encoder: Encoder
    policy: TokenPolicy

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def scoring(self) -> Scoring: ...

    def count(self, stage: TokenStage, tokens: int) -> int:
        """How many of a text's tokens stay, by a ratio or a quantile."""


class Scoring(Protocol):
    """A scorer as a module: scores [B, T] of `real` [B, T] and a tuple of the evidence that `needs` names."""

    needs: tuple[str, ...]

    def __call__(self, real: Tensor, evidence: tuple[Tensor, ...]) -> Tensor: ...


class Stages:
    """Writes the stages of a policy; asked behind one layer after the other, and for the pooling at the end."""

    def __init__(self, pruned: TokenPruned, opset: int):
        if pruned.policy.action == "merge":
            raise UnsupportedModel("merging tokens cannot be exported: it runs on torch only; let the policy drop them")
        self._pruned, self._opset = pruned, opset
        self.policy = pruned.policy.to_json()
        self._policy, self._layout = pruned.policy, pruned.encoder.layout
        self._needs = pruned.scoring.needs
        self._stages = {stage.after: stage for stage in pruned.policy.stages}
        self._longest = int(pruned.encoder.model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
        self._traces: dict[int, Any] = {}
        self._at: dict[str, str] = {}  # names of what is known of the tokens that are left

    @property
    def keys_read(self) -> set[int]:
        """The layers, counted from 0, whose keys are read."""
        return {after - 1 for after in self._stages if "keys" in self._needs}

    def between(self, writer: Writer, index: int, flow: Flow) -> Flow:
        """The stage behind layer `index`, if there is one; what the next layer reads."""
        stage = self._stages.get(index + 1)
        if stage is None:
            return flow
        if not self._at:
            self._begin(_Named(writer, "tokens."))
        written = self._unless_short if "short" in self._at else self._stage
        return written(writer, index, flow, stage)

    def _unless_short(self, writer: Writer, index: int, flow: Flow, stage: TokenStage) -> Flow:
        """The stage in a branch of its own, which a batch of texts that all keep all their tokens does not enter."""
        node, at, inner = _Named(writer, f"tokens.{stage.after}."), dict(self._at), Writer()
        made = self._stage(inner, index, flow, stage)
        writer.initializers.extend(inner.initializers)
        done = {output for one in inner.nodes for output in one.output}
        known = [name for name in self._read_later(stage) if self._at.get(name) in done]
        outcomes = {name: _Outcome(getattr(flow, name), getattr(made, name), *_FLOW[name]) for name in _FLOW}
        for name in known:
            kind, rank = _KNOWN[name]
            before = at.get(name) or node.nothing(f"no_{name}", kind, rank)
            outcomes[name] = _Outcome(before, self._at[name], kind, rank)
        after = _chosen(node, at["short"], inner.nodes, outcomes)
        self._at |= {name: after[name] for name in known}
        return Flow(**{name: after[name] for name in _FLOW})

    def _read_later(self, stage: TokenStage) -> tuple[str, ...]:
        """What is read behind the stage of that which is known of the tokens."""
        if stage.after < max(self._stages):
            return tuple(_KNOWN)
        return () if self._layout.pooling == "cls" else ("number", "length", "real", "gone")

    def _stage(self, writer: Writer, index: int, flow: Flow, stage: TokenStage) -> Flow:
        if "standing" not in self._at:
            self._rank(_Named(writer, "tokens."))
        node, at = _Named(writer, f"tokens.{stage.after}."), self._at
        shape = node("Concat", [at["batch"], at["length"], node.whole("rest", [-1])], "rows_shape", axis=0)
        rows = node("Reshape", [flow.stream, shape], "rows")
        scores = node("Add", [self._scores(node, index, rows, stage), at["standing"]], "scores")
        number = self._number(node, scores, stage)
        return self._shortened(node, scores, number, rows, stage)

    def _begin(self, node: _Named) -> None:
        """What is known of the tokens when nothing has gone yet."""
        at, policy = self._at, self._policy
        zero, one, two = (node.whole(f"end.{i}", [i]) for i in range(3))
        at["batch"] = node("Slice", [SIZE, zero, one], "batch")
        at["length"] = at["first_length"] = node("Slice", [SIZE, one, two], "length")
        at["number"] = at["lengths"] = node("ReduceSum", ["attention_mask", one], "lengths", keepdims=1)  # [B, 1]
        at["real"] = node("Cast", ["attention_mask"], "real", to=_FLOAT)
        if policy.off_below > policy.least:
            at["limit"] = node.whole("off_below", [policy.off_below])
            at["short"] = node("LessOrEqual", [at["length"], at["limit"]], "short")
        if self._layout.position_bias:
            at["bias"] = node("Reshape", [BIAS, node.whole("bias_shape", [0, -1])], "flat_bias")

    def _rank(self, node: _Named) -> None:
        """What the first stage makes of them, for itself and those after it."""
        at, policy = self._at, self._policy
        one, two = node.whole("axis.1", [1]), node.whole("axis.2", [2])
        standing, lowest = node.real("zero", 0), node.real("lowest", -HUGE)
        at["ids"] = "input_ids"
        if "positions" in self._needs:
            slots = node("Slice", [self._slots(node), node.whole("start", [0]), at["length"]], "columns")
            at["positions"] = node("Expand", [slots, SIZE], "positions")
        one_table = policy.rule != "threshold" and len(self._stages) == 1  # which tells of short texts too
        if "limit" in at and not one_table:
            at["whole"] = node("LessOrEqual", [at["lengths"], at["limit"]], "whole")
        if policy.special_ids:
            wide = node("Unsqueeze", ["input_ids", two], "wide_ids")
            equal = node("Equal", [wide, node.whole("special_ids", policy.special_ids)], "equal")  # [B, T, ids]
            matches = node("ReduceMax", [node("Cast", [equal], "matches", to=_FLOAT), two], "match", keepdims=0)
            special = node("Mul", [matches, at["real"]], "special")
            standing = node("Mul", [special, node.real("highest", HUGE)], "raised")
            if policy.rule != "threshold":
                total = node("ReduceSum", [special, one], "special_total", keepdims=1)
                at["specials"] = node("Cast", [total], "specials", to=_INT64)  # [B, 1]
        is_real = node("Cast", ["attention_mask"], "is_real", to=_BOOL)
        at["standing"] = node("Where", [is_real, standing, lowest], "standing")

    def _slots(self, node: _Named) -> str:
        """0, 1, 2, ... as far as a text can be long."""
        if "slots" not in self._at:
            self._at["slots"] = node.whole("slots", range(self._longest))
        return self._at["slots"]

    def _scores(self, node: _Named, index: int, rows: str, stage: TokenStage) -> str:
        """[B, T], by the scorer's own code."""
        heads, layout = self._pruned.encoder.layers[index].num_heads, self._layout
        name = node.prefix + "score"
        sources = {
            "stream": rows,
            "keys": KEYS.format(index),
            "attention": WEIGHTS.format(index),
            "ids": self._at["ids"],
            "positions": self._at.get("positions", ""),
        }
        if "first_attention" in self._needs:
            first = node.whole("first", 0)
            sources["first_attention"] = node("Gather", [WEIGHTS.format(index), first], "first_attention", axis=2)
        if "gate" in self._needs:
            gate = self._pruned.tensors[f"gate.{stage.after}"]
            sources["gate"] = node.tensor("gate", gate.detach().cpu().numpy().astype(np.float32))
        if heads not in self._traces:
            self._traces[heads] = _traced(self._pruned.scoring, layout.width, heads, layout.head_dim, self._opset)
        model = copy.deepcopy(self._traces[heads])
        prefix(model, f"{name}.", {"real": self._at["real"], "score": name} | {k: sources[k] for k in self._needs})
        node.writer.nodes.extend(model.graph.node)
        node.writer.initializers.extend(model.graph.initializer)
        return name

    def _number(self, node: _Named, scores: str, stage: TokenStage) -> str:
        """How many tokens every text keeps, int64 [B, 1]."""
        at, policy = self._at, self._policy
        exempt = max(policy.off_below, policy.least)
        if policy.rule == "threshold":
            above = node("GreaterOrEqual", [scores, node.real("level", stage.keep)], "above")
            axis = node.whole("tokens_axis", [1])
            number = node("ReduceSum", [node("Cast", [above], "passing", to=_INT64), axis], "passed", keepdims=1)
            number = node("Max", [number, node.whole("least", policy.least)], "at_least")
            number = node("Min", [number, at["number"]], "at_most")
        else:
            table = [self._pruned.count(stage, n) for n in range(self._longest + 1)]
            if at["number"] == at["lengths"]:  # nothing has gone yet: the table can tell which texts keep all
                table = [n if n <= exempt else stay for n, stay in enumerate(table)]
            number = node("Gather", [node.whole("table", table), at["number"]], "counted")
            if "specials" in at:
                number = node("Max", [number, at["specials"]], "at_least")
            if at["number"] == at["lengths"]:
                return number
        return node("Where", [at["whole"], at["number"], number], "number") if "whole" in at else number

    def _shortened(self, node: _Named, scores: str, number: str, rows: str, stage: TokenStage) -> Flow:
        """The texts without the tokens that go here; what the next layer reads."""
        at, before = self._at, dict(self._at)
        zero, one = node.whole("axis.0", [0]), node.whole("axis.1", [1])
        most = node("ReduceMax", [number, zero], "most", keepdims=0)
        node("TopK", [scores, most], "best", outputs=2, axis=1)
        slots = node("Slice", [self._slots(node), zero, most], "columns")
        kept = node("Less", [slots, number], "kept")  # [B, L]
        last = node("Sub", [at["length"], one], "last")  # any token will do where none is kept, if it sorts behind
        chosen = node("Where", [kept, f"{node.prefix}best.1", last], "chosen")
        node("TopK", [chosen, most], "sorted", outputs=2, axis=1, largest=0)
        places = f"{node.prefix}sorted.0"  # [B, L], rising
        wide = node("Unsqueeze", [places, node.whole("axis.2", [2])], "wide_places")
        short = node("GatherND", [rows, wide], "short_rows", batch_dims=1)  # [B, L, D]
        stream = node("Reshape", [short, node.whole("flat_shape", [-1, self._layout.width])], "stream")

        later = [other for other in self._stages if other > stage.after]
        lowest = node.real("lowest", -HUGE)
        if later:
            own = node("GatherElements", [at["standing"], places], "own_standing", axis=1)
            at["standing"] = node("Where", [kept, own, lowest], "standing")
        for name, wanted in (("ids", later and "ids" in self._needs), ("positions", self._positions_read(later))):
            if wanted:
                at[name] = node("GatherElements", [at[name], places], name, axis=1) if name in at else places
        at["real"] = node("Cast", [kept], "real", to=_FLOAT)
        at["number"], at["length"] = number, most
        if self._policy.exit:
            self._leave(node, rows, short, before, stage)
        wide_kept = node("Unsqueeze", [kept, node.whole("mask_axes", [1, 2])], "wide_kept")
        mask = node("Where", [wide_kept, node.real("zero", 0), lowest], "mask")  # [B, 1, 1, L]
        if self._layout.position_bias:
            mask = node("Add", [self._bias(node), mask], "biased_mask")
        head = node.whole("head_shape", [-1, self._layout.head_dim])
        split = node("Concat", [at["batch"], most, head], "split_shape", axis=0)
        return Flow(stream, mask, split)

    def _positions_read(self, later: list[int]) -> bool:
        return bool(self._layout.position_bias or (later and "positions" in self._needs))

    def _bias(self, node: _Named) -> str:
        """The position bias of the tokens that are left [B, H, L, L]."""
        at = self._at
        rows = node("Unsqueeze", [at["positions"], node.whole("bias_axis.2", [2])], "bias_rows")
        columns = node("Unsqueeze", [at["positions"], node.whole("bias_axis.1", [1])], "bias_columns")
        pairs = node("Add", [node("Mul", [rows, at["first_length"]], "bias_starts"), columns], "bias_pairs")
        found = node("Gather", [at["bias"], pairs], "bias_found", axis=1)  # [H, B, L, L]
        return node("Transpose", [found], "bias", perm=[1, 0, 2, 3])

    def _leave(self, node: _Named, rows: str, short: str, before: Mapping[str, str], stage: TokenStage) -> None:
        """Adds what the dropped tokens add to the sum over a text's tokens [B, 1, D], by the linear exit."""
        weight, bias = (
            node.tensor(f"exit_{part}", self._pruned.tensors[f"exit.{stage.after}.{part}"].detach().cpu().numpy())
            for part in ("weight", "bias")
        )
        all_tokens = node("MatMul", [node.wide(before["real"], "was_real", 1), rows], "sum_before")
        left = node("MatMul", [node.wide(self._at["real"], "is_real", 1), short], "sum_left")
        moved = node("MatMul", [node("Sub", [all_tokens, left], "sum_dropped"), weight], "moved")
        fewer = node("Sub", [before["number"], self._at["number"]], "fewer")
        dropped = node.wide(node("Cast", [fewer], "dropped", to=_FLOAT), "wide_dropped", 2)
        gone = node("Add", [moved, node("Mul", [dropped, bias], "biases")], "gone_here")
        self._at["gone"] = node("Add", [before["gone"], gone], "gone") if "gone" in before else gone

    def pool(self, writer: Writer) -> None:
        """POOLED [B, 1, D], the mean over a text's tokens, from OUTPUT [B*T, D]."""
        node, at = _Named(writer, "tokens.pool."), self._at
        shape = node("Concat", [at["batch"], at["length"], node.whole("rest", [-1])], "rows_shape", axis=0)
        rows = node("Reshape", [OUTPUT, shape], "rows")
        total = node("MatMul", [node.wide(at["real"], "is_real", 1), rows], "sum")
        if "gone" in at:
            total = node("Add", [total, at["gone"]], "whole_sum")
        number = node("Cast", [at["lengths"] if "gone" in at else at["number"]], "number", to=_FLOAT)
        writer.node("Div", [total, node.wide(number, "wide_number", 2)], POOLED)


_FLOAT, _INT64, _BOOL = 1, 7, 9  # of onnx.TensorProto
# Type and number of axes: of what the next layer reads, and of what later stages and the pooling know of the tokens.
_FLOW = {"stream": (_FLOAT, 2), "mask": (_FLOAT, 4), "split_shape": (_INT64, 1)}
_KNOWN = {
    "number": (_INT64, 2),
    "length": (_INT64, 1),
    "real": (_FLOAT, 2),
    "gone": (_FLOAT, 3),
    "standing": (_FLOAT, 2),
    "specials": (_INT64, 2),
    "whole": (_BOOL, 2),
    "ids": (_INT64, 2),
    "positions": (_INT64, 2),
}


@dataclass(frozen=True)
class _Named:
    """Writes nodes and tensors under a prefix."""

    writer: Writer
    prefix: str

    def __call__(self, op: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        return self.writer.node(op, inputs, self.prefix + name, outputs, **attributes)

    def tensor(self, name: str, value: Array) -> str:
        return self.writer.tensor(self.prefix + name, value)

    def whole(self, name: str, values: int | Iterable[int]) -> str:
        """An int64 tensor."""
        return self.tensor(name, np.array(values if isinstance(values, int) else list(values), np.int64))

    def real(self, name: str, value: float) -> str:
        """A float32 number."""
        return self.tensor(name, np.array(value, np.float32))

    def nothing(self, name: str, kind: int, rank: int) -> str:
        """A zero of a type of onnx.TensorProto, with `rank` axes."""
        from onnx import helper

        return self.tensor(name, np.zeros([1] * rank, helper.tensor_dtype_to_np_dtype(kind)))

    def wide(self, source: str, name: str, axis: int) -> str:
        """`source` with one more axis."""
        return self("Unsqueeze", [source, self.whole(f"{name}_axis", [axis])], name)


@dataclass(frozen=True)
class _Outcome:
    """A result of an If: its name where the stage is skipped and where it is not, its type and number of axes."""

    skipped: str
    done: str
    kind: int
    rank: int


def _chosen(node: _Named, skip: str, stage: list[Any], outcomes: Mapping[str, _Outcome]) -> dict[str, str]:
    """The names of the outcomes, behind an If that runs the nodes of the stage unless `skip`."""
    from onnx import helper

    passing, names = Writer(), {name: f"{node.prefix}after.{name}" for name in outcomes}
    for name, one in outcomes.items():
        passing.node("Identity", [one.skipped], f"{node.prefix}skipped.{name}")

    def branch(name: str, nodes: list[Any], results: Iterable[str]) -> Any:
        infos = [
            helper.make_tensor_value_info(result, one.kind, [None] * one.rank)
            for result, one in zip(results, outcomes.values(), strict=True)
        ]
        return helper.make_graph(nodes, node.prefix + name, [], infos)

    branches = {
        "then_branch": branch("skipped", passing.nodes, [one.name for one in passing.nodes]),
        "else_branch": branch("stage", stage, [one.done for one in outcomes.values()]),
    }
    made = helper.make_node("If", [skip], list(names.values()), name=f"{node.prefix}unless_short", **branches)
    node.writer.nodes.append(made)
    return names


def _traced(scoring: Scoring, width: int, heads: int, head_dim: int, opset: int) -> Any:
    """The scorer as an ONNX graph from `real` and what it needs to `score`."""
    import torch

    size = (2, 7)  # as `trace` wants it; a tensor given twice would be traced as one input
    examples = {
        "stream": (torch.ones(*size, width), TOKENS),
        "keys": (torch.ones(2, heads, 7, head_dim), {0: "batch", 2: "length"}),
        "attention": (torch.ones(2, heads, 7, 7), {0: "batch", 2: "length", 3: "length"}),
        "first_attention": (torch.ones(2, heads, 7), {0: "batch", 2: "length"}),
        "ids": (torch.ones(size, dtype=torch.long), TOKENS),
        "positions": (torch.ones(size, dtype=torch.long), TOKENS),
        "gate": (torch.ones(width), {}),
    }
    evidence, axes = zip(*(examples[name] for name in scoring.needs), strict=True)
    inputs = (torch.ones(size), tuple(evidence))
    names = ["real", *scoring.needs]
    return trace(cast("nn.Module", scoring), inputs, names, ["score"], opset, [TOKENS, tuple(axes)])
