"""Every noun of Paredown: frozen values, each of them writable as JSON.

Legend: U units, S entries of one unit along one axis of one tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
BRANCHES = "branches"  # the group whose units are a graph's residual branches


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, arrays as lists, dataclasses as objects."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False)


def finite(value: object) -> object:
    """The value as plain JSON types with None for every number that is not finite, which JSON cannot say."""
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return finite(_plain(value))
    return finite(value.tolist()) if isinstance(value, np.ndarray) else value


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


# ---------------------------------------------------------------------------------------------- what can be cut


@dataclass(frozen=True)
class Slice:
    """Which entries of one tensor's axis each unit owns.

    `positions` is an integer array [U, S]; `tensor` is the name in the dense model's state dict. Zeroing the
    consumers of the dropped units computes the same as removing producers and consumers alike.
    """

    tensor: str
    axis: int
    positions: Array
    role: str  # "producer" | "consumer"


@dataclass(frozen=True)
class Counter:
    """An integer attribute that must follow the cut: `per_unit` times the number of units kept."""

    module: str
    attribute: str
    per_unit: int


@dataclass(frozen=True)
class Group:
    """Units that may be dropped one by one.

    `kind` is "head", "neuron", "layer", "channel" or "branch"; `layer` the dense layer's index (-1 for the group of all
    layers, and in a graph). Where a group is not `exact`, norms take their statistics over its units: masking it is no
    cut. Keeping no unit of a head or neuron group drops the whole sub-layer (its bias and its norm stay).
    A "layer" group has no slices: its units are the entries of the module list `blocks`. Nor has a "branch" group: its
    units are the `branches` of a graph.
    """

    name: str
    kind: str
    units: int
    slices: tuple[Slice, ...] = ()
    counters: tuple[Counter, ...] = ()
    blocks: str = ""
    exact: bool = True
    minimum: int = 0
    layer: int = -1

    @property
    def consumer(self) -> Slice:
        """The slice of what reads the units' outputs; it must have one."""
        return next(part for part in self.slices if part.role == "consumer")


@dataclass(frozen=True)
class Layout:
    """Where the parts of a transformer are found: module names in the transformers model.

    The names in `layer_names` are relative to one entry of the module list `layers`. `head` is applied in turn to
    the pooled vector [B, 1, D] (it is empty for sentence encoders); "relu" stands for the function. A decoder, whose
    `pooling` is "tokens", has its final norm and its output embedding there, and further fields of its own.
    """

    layers: str
    embeddings: tuple[str, ...]
    layer_names: Mapping[str, str]  # query key value output attention_norm up down ffn_norm attention
    num_heads: int
    head_dim: int
    width: int  # D, of the residual stream
    activation: str
    token_types: bool
    pooling: str  # "cls" | "mean" | "tokens"
    head: tuple[str, ...] = ()
    normalize: bool = False
    position_bias: str = ""  # the module whose compute_position_bias(x) gives [B, H, T, T] (MPNet)
    rotary: str = ""  # the module that gives rotary positions (decoders)
    logit_cap: float = 0.0  # logits are cap * tanh(logits / cap); 0 for none (Gemma 2)
    unused: tuple[str, ...] = ()  # modules whose output this task never reads, such as a sentence encoder's pooler


@dataclass(frozen=True)
class Size:
    """An integer in a graph that follows the cut: of operator `node`, at `place` among its arguments.

    It is `fixed`, plus, of every unit kept, the entry of `counts[group]` [U].
    """

    node: str
    place: tuple[int, ...]
    fixed: int
    counts: Mapping[str, Array]


@dataclass(frozen=True)
class Cuttable:
    """What can be cut from one model. `fingerprint` is the sha256 of the names and shapes of its tensors."""

    family: str
    fingerprint: str
    groups: tuple[Group, ...]

    def group(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are {[g.name for g in self.groups]}")

    def identity(self) -> dict[str, tuple[int, ...]]:
        """The keep table that drops nothing."""
        return {group.name: tuple(range(group.units)) for group in self.groups}


@dataclass(frozen=True)
class Anatomy(Cuttable):
    """Of a transformer: heads, neurons and layers, and where its parts are found."""

    layout: Layout


@dataclass(frozen=True)
class Branch:
    """A part of a graph that is added to a shortcut, and which may go as a whole: the shortcut then stands alone.

    `join` is the node that adds, `end` the one whose value goes; `nodes` are all that work for it and nothing else,
    `weights` the names of the weights that they multiply with, `groups` the groups of channels that lie inside.
    """

    name: str
    join: str
    end: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class GraphAnatomy(Cuttable):
    """Of a traced network: groups of coupled channels, the integers in its graph that follow a cut, and what is left
    whole: the name of a tensor and why, such as {"fc.weight": "the network's answer (output)"}.

    Where there are `branches`, a group named "branches" has them as its units.
    """

    sizes: tuple[Size, ...] = ()
    whole: Mapping[str, str] = dataclasses.field(default_factory=dict)
    branches: tuple[Branch, ...] = ()

    @property
    def channels(self) -> tuple[Group, ...]:
        """The groups of channels."""
        return tuple(group for group in self.groups if group.kind == "channel")

    @property
    def streams(self) -> tuple[str, ...]:
        """The groups of channels in which branches are added: those that a branch makes and that lie outside of it."""
        made = {(weight, group) for branch in self.branches for weight in branch.weights for group in branch.groups}
        weights = {weight for branch in self.branches for weight in branch.weights}
        return tuple(
            group.name
            for group in self.channels
            if any(
                part.role == "producer" and part.tensor in weights and (part.tensor, group.name) not in made
                for part in group.slices
            )
        )

    def gone(self, plan: Plan) -> tuple[Branch, ...]:
        """The branches that a plan drops; none where it does not speak of them."""
        stay = plan.keep.get(BRANCHES, range(len(self.branches)))
        return tuple(branch for number, branch in enumerate(self.branches) if number not in stay)

    def kept(self, plan: Plan, tensor: str, axis: int, size: int) -> Array:
        """The entries of a tensor's axis, of so many, that a plan leaves."""
        stay = np.ones(size, dtype=bool)
        for group in self.channels:
            gone = np.setdiff1d(np.arange(group.units), plan.keep[group.name])
            for part in group.slices:
                if (part.tensor, part.axis) == (tensor, axis):
                    stay[part.positions[gone].ravel()] = False
        return np.flatnonzero(stay)


# ------------------------------------------------------------------------------------- how much it matters, what stays


@dataclass(frozen=True)
class Scores:
    """`values[group]` has shape [U]; larger means keep."""

    criterion: str
    values: Mapping[str, Array]
    source: str = ""


@dataclass(frozen=True)
class Budget:
    """Exactly one dial. `metric` is latency, params, macs or channels; `keep` the share of the dense model's that may
    stay.
    """

    metric: str
    keep: float

    def __post_init__(self) -> None:
        if self.metric not in ("latency", "params", "macs", "channels"):
            raise ValueError(f"metric is {self.metric!r}; choose latency, params, macs or channels")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; it is a share, above 0 and at most 1")


@dataclass(frozen=True)
class Limits:
    """What a target runtime likes: neuron widths in multiples, and whether every layer must have the same widths.

    `allowed` names the kinds of groups ("head", "neuron", "layer") that may be cut.
    """

    multiple_of: int = 1
    uniform: bool = False
    allowed: tuple[str, ...] = ("head", "neuron", "layer")


@dataclass(frozen=True)
class Plan:
    """Which units stay: `keep[group]` holds sorted unit indices of the dense model. It IS the small architecture."""

    fingerprint: str
    keep: Mapping[str, tuple[int, ...]]
    source: str = ""
    version: int = 1

    @property
    def id(self) -> str:
        """sha256 of what is kept of which model; how the plan was found does not count."""
        body = {"version": self.version, "fingerprint": self.fingerprint, "keep": self.keep}
        return hashlib.sha256(canonical_json(body).encode()).hexdigest()

    def to_json(self) -> str:
        return canonical_json(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        raw = json.loads(text)
        if raw.get("version") != 1:
            raise ValueError(f"plan version {raw.get('version')!r} is not known to this release; it reads version 1")
        keep = {name: tuple(int(u) for u in units) for name, units in raw["keep"].items()}
        return cls(raw["fingerprint"], keep, raw.get("source", ""), raw["version"])


# ----------------------------------------------------------------------------------- what is skipped while it runs

RULES = ("ratio", "quantile", "threshold")
ACTIONS = ("drop", "merge")


@dataclass(frozen=True)
class TokenStage:
    """Tokens go once `after` layers have run; `keep` is read by the policy's rule.

    ratio: the share that stays. quantile: those below this quantile of the scores go. threshold: those below it go.
    """

    after: int
    keep: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", float(self.keep))  # 1 and 1.0 are one policy: its id hashes what is written


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens of a text are left out of the later layers, decided while the model runs.

    `scorer` is a file of `tokens/`; special tokens always stay, in the order of the text. With `action` "merge" the
    tokens most like another are averaged with it (ToMe) instead of dropped. No text falls below `least` tokens, and
    one of at most `off_below` tokens keeps all. With `exit`, dropped tokens count in the mean as a linear map of where
    they were. `special_ids` are the token ids that stay.
    """

    scorer: str
    stages: tuple[TokenStage, ...] = ()
    rule: str = "ratio"
    action: str = "drop"
    least: int = 1
    exit: bool = False
    off_below: int = 0
    special_ids: tuple[int, ...] = ()
    version: int = 1

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}; choose {', '.join(RULES)}")
        if self.action not in ACTIONS:
            raise ValueError(f"action is {self.action!r}; choose {', '.join(ACTIONS)}")
        if self.action == "merge" and (self.rule == "threshold" or self.exit):
            raise ValueError("merging takes a ratio or a quantile, and no exit: merged tokens count as they are")
        afters = [stage.after for stage in self.stages]
        if afters != sorted(set(afters)) or min(afters, default=1) < 1:
            raise ValueError(f"stages come after layers {afters}; each is 1 or more, and they rise")
        if self.rule != "threshold" and not all(0 <= stage.keep <= 1 for stage in self.stages):
            raise ValueError(f"a {self.rule} is a share from 0 to 1; got {[stage.keep for stage in self.stages]}")
        if not np.isfinite([stage.keep for stage in self.stages]).all():
            raise ValueError(f"a threshold is a finite number; got {[stage.keep for stage in self.stages]}")
        if self.least < 1 or self.off_below < 0:
            raise ValueError("least is 1 or more, off_below 0 or more")

    @property
    def is_identity(self) -> bool:
        """Whether it can drop nothing, whatever the text."""
        whole = {"ratio": 1.0, "quantile": 0.0}.get(self.rule)
        return all(stage.keep == whole for stage in self.stages)

    @property
    def id(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return canonical_json(self)

    @classmethod
    def from_json(cls, text: str) -> TokenPolicy:
        raw = json.loads(text)
        if raw.get("version") != 1:
            raise ValueError(f"token policy version {raw.get('version')!r} is not known to this release")
        stages = tuple(TokenStage(int(one["after"]), float(one["keep"])) for one in raw.pop("stages"))
        return cls(stages=stages, special_ids=tuple(int(i) for i in raw.pop("special_ids")), **raw)


# ------------------------------------------------------------------------------------------------------- is it true


@dataclass(frozen=True)
class Interval:
    """A figure with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """One figure with its interval, unit, number of samples and method."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    samples: int
    method: str


@dataclass(frozen=True)
class Report:
    """The evidence for one plan on one machine."""

    plan_id: str
    machine: Mapping[str, Any]
    measurements: tuple[Measurement, ...]

    def to_json(self) -> str:
        return canonical_json(self)

    @classmethod
    def from_json(cls, text: str) -> Report:
        raw = json.loads(text)
        return cls(raw["plan_id"], raw["machine"], tuple(Measurement(**m) for m in raw["measurements"]))

    def get(self, name: str) -> Measurement:
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        raise KeyError(name)


class Runner(Protocol):
    """Whatever runs a model: named arrays in, named arrays out.

    Text encoders take int64 arrays [B, T] `input_ids`, `attention_mask` (and `token_type_ids` where the family has
    it) and give float32 `logits` [B, C] or `embeddings` [B, D].
    """

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    def close(self) -> None: ...


def as_indices(units: Sequence[int] | Array) -> tuple[int, ...]:
    """Sorted unit indices as plain integers."""
    return tuple(sorted(int(u) for u in cast(Sequence[int], units)))
