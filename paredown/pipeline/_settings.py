"""What a run is asked to do, and how it tells how far it is."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from paredown import registry
from paredown.errors import ParedownError
from paredown.planning import RANKINGS, SCHEDULES, Shares
from paredown.sparsity import ALLOCATIONS, Pattern

TARGETS = ("onnxruntime", "openvino", "torch", "sparse_cpu")
POLICY = "policy.json"  # in a folder that holds a token policy
DEFAULT_DROP = 0.01
KINDS = ("heads", "queries", "neurons", "layers", "sublayers")  # of units, as the fields of Shares
RECOVERIES = ("none", "compensate", "reconstruct", "distill", "finetune")
TRAINED = ("distill", "finetune")
PROTECTED = 2  # first and last layers of a language model, that stay whole unless asked for otherwise
COLUMNS = ("text_column", "label_column", "pair_column", "score_column")


@dataclass(frozen=True)
class Settings:
    """One run of `prune`. At most one of `speedup`, `latency_ms` and an amount is set; else `max_drop` is the dial.

    `max_drop` is absolute (0.01 is one point of accuracy, or 0.01 of cosine), but of a language model it is the share
    by which perplexity may rise. With another dial it is an additional gate, and None asks for no bound on quality.

    Amounts are what goes (`heads` to `sublayers`, as in `planning.Shares`), or the share of all `parameters` that
    stays, which heads and neurons make up. They are reached in `rounds` by a `schedule`, scores anew in each;
    `minimum_heads` and `minimum_neurons` stay in every layer that keeps any.
    `criterion` ranks heads and neurons ("obs", but "ablation" for a language model's heads), `depth_criterion` layers.
    `recover` says what follows each cut; training takes `minutes` in all, or as many `steps`, or none at 0 minutes.
    `lora` is the rank of LoRA's matrices, 0 for none. Without a `target` it is "onnxruntime", or "torch"
    for a language model. `tokens` is a folder with a token policy, as a sweep or search writes it, to be tried instead
    of the usual ones.

    With a `pattern` ("unstructured", "2:4", "4x1") weights are zeroed, after the amounts are cut: a share of `sparsity`
    of them (n:m says its own), chosen by a `solver`, shared out by an `allocation`; `permute` lets neurons change
    places before n:m. `rounds` and the schedule are then those of the zeros, and training keeps them. The `target` is
    "sparse_cpu" by default, which runs nothing else.

    The rest is for image classifiers, whose `model` may be "package.module:factory" with `weights` in a safetensors
    file. Pictures / 255 are normalized by `mean` and `std`, those of a folder brought to `size` (height, width).
    Amounts are a share of the `channels` of every layer, or the share of the multiply-accumulates (`macs`) or
    `parameters` that stays. Every layer keeps `minimum_channels` (a share) in multiples of `multiple_of`, by default of
    8 or, for an amount that these miss, of less. Layers named in `whole`, separated by commas, are not cut ("none" for
    none; by default the first one is not, nor residual streams where macs or parameters are better saved elsewhere),
    and `layer_shares` says what others lose: "layer1.0.conv1=50%,fc=0". With `by_sensitivity` macs and parameters are
    shared out by what each layer loses alone, as measured, and whole residual branches may go; a ranking of scores
    decides otherwise. A training also shows pictures `mirrored`, unless they then mean something else, as digits and
    letters do.
    """

    model: str
    data: str
    eval: str | None
    out: str
    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    pair_column: str | None = None
    score_column: str | None = None
    max_drop: float | None = None
    speedup: float | None = None
    latency_ms: float | None = None
    heads: float = 0.0
    queries: float = 0.0
    neurons: float = 0.0
    layers: float = 0.0
    sublayers: float = 0.0
    parameters: float | None = None
    criterion: str = ""
    depth_criterion: str = "removal_loss"
    ranking: str = "global"
    protect: int | None = None
    minimum_heads: int = 1
    minimum_neurons: int = 1
    rounds: int = 1
    schedule: str = "cubic"
    recover: str = "distill"
    pattern: str = ""
    sparsity: float | None = None
    solver: str = "sparsegpt"
    allocation: str = "uniform"
    permute: bool = False
    lora: int = 0
    steps: int | None = None
    target: str = ""
    uniform: bool = False
    tokens: str | None = None
    minutes: float = 20.0
    confidence: float = 0.9
    seed: int = 0
    threads: int | None = None
    max_length: int | None = None
    weights: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    channels: float = 0.0
    macs: float | None = None
    minimum_channels: float = 0.1
    multiple_of: int | None = None
    whole: str = ""
    layer_shares: str = ""
    by_sensitivity: bool = False
    mirrored: bool = True

    def __post_init__(self) -> None:
        if self.speedup is not None and self.latency_ms is not None:
            raise ParedownError("Ask for a speed-up or for a latency, not for both.")
        if self.sized and (self.speedup is not None or self.latency_ms is not None):
            raise ParedownError("Ask for a speed or for an amount (heads, neurons, layers, parameters), not for both.")
        if self.parameters is not None and any(getattr(self, kind) for kind in KINDS[:3]):
            raise ParedownError("parameters says how many heads and neurons go: give it, or their shares, not both.")
        self._check_without_amount(_GIVEN_WITH_AMOUNTS)
        if self.layer_shares and (self.by_sensitivity or not self.sized):
            raise ParedownError("layer_shares goes with channels, macs or parameters, and not with by_sensitivity.")
        if self.by_sensitivity and self.macs is None and self.parameters is None:
            raise ParedownError("by_sensitivity goes with macs or parameters.")
        if (self.lora or self.steps) and self.recover not in TRAINED:
            raise ParedownError(f"lora and steps are for training, and recover is {self.recover!r}: take distill.")
        if self.target and self.target not in TARGETS:
            raise ParedownError(f"There is no target {self.target!r}; choose one of {', '.join(TARGETS)}.")
        if self.zeroes:
            self._check_zeros()
        elif stray := [name for name in _OF_ZEROS if getattr(self, name) != _DEFAULT[name]]:
            raise ParedownError(f"{stray[0]} is for sparsify, which needs a pattern.")
        elif self.target == "sparse_cpu":
            raise ParedownError("sparse_cpu runs what sparsify makes; prune for onnxruntime, openvino or torch.")
        checks = (
            (self.max_drop is None or 0 <= self.max_drop < 1, "max_drop is a share from 0 to below 1, such as 0.01"),
            (self.speedup is None or 1 <= self.speedup < math.inf, "speedup is a factor of 1 or more"),
            (self.latency_ms is None or 0 < self.latency_ms < math.inf, "latency_ms is a time above 0"),
            (0 <= self.minutes < math.inf, "minutes is a time of 0 or more"),
            (0.5 <= self.confidence < 1, "confidence is a share from 0.5 to below 1"),
            (self.threads is None or self.threads >= 1, "threads is 1 or more"),
            (self.max_length is None or self.max_length >= 4, "max_length is 4 tokens or more"),
            (0 <= self.channels < 1, "channels is a share from 0 to below 1, such as 0.3"),
            (self.macs is None or 0 < self.macs <= 1, "macs is a share above 0, such as 0.5"),
            (0 < self.minimum_channels <= 1, "minimum_channels is a share above 0, such as 0.1"),
            (self.multiple_of is None or self.multiple_of >= 1, "multiple_of is 1 or more"),
            (
                not self.channels or (self.macs is None and self.parameters is None),
                "channels says by itself how much goes: leave out macs and parameters",
            ),
            (self.macs is None or self.parameters is None, "say macs or parameters, not both"),
            *((_amount(getattr(self, k)), f"{k} is a share from 0 to below 1, or a whole number") for k in KINDS),
            (self.parameters is None or 0 < self.parameters <= 1, "parameters is a share above 0, such as 0.5"),
            (self.rounds >= 1, "rounds is 1 or more"),
            (self.schedule in SCHEDULES, f"schedule is one of {', '.join(SCHEDULES)}"),
            (self.ranking in RANKINGS, f"ranking is one of {', '.join(RANKINGS)}"),
            (self.recover in RECOVERIES, f"recover is one of {', '.join(RECOVERIES)}"),
            (self.protect is None or self.protect >= 0, "protect is 0 or more"),
            (min(self.minimum_heads, self.minimum_neurons) >= 1, "minimum_heads and minimum_neurons are 1 or more"),
            (self.lora >= 0, "lora is a rank of 0 or more"),
            (self.steps is None or self.steps >= 1, "steps is 1 or more"),
            (not self.tokens or not (self.sized or self.uniform), "tokens goes with neither an amount nor uniform"),
        )
        for fine, sentence in checks:
            if not fine:
                raise ParedownError(f"{sentence}.")

    def _check_zeros(self) -> None:
        pattern = Pattern.parse(self.pattern)
        own = pattern.sparsity
        if own is None and self.sparsity is None:
            raise ParedownError("Say how much is to be zero: --sparsity 0.8.")
        if own is not None and self.sparsity is not None and abs(own - self.sparsity) > 1e-9:
            raise ParedownError(f"{pattern} is a sparsity of {own:g}, and {self.sparsity:g} was asked for.")
        if not 0 < self.share < 1:
            raise ParedownError("sparsity is a share above 0 and below 1, such as 0.8.")
        if self.speedup is not None or self.latency_ms is not None:
            raise ParedownError("Zeros are asked for by a sparsity, not by a speed.")
        if self.recover not in ("none", *TRAINED):
            raise ParedownError(f"{self.recover} would fill the zeros: take distill, finetune or none.")
        if self.lora or self.uniform or self.tokens:
            raise ParedownError("Zeros go with neither LoRA, nor uniform, nor tokens.")
        if self.criterion and not self.cuts:
            raise ParedownError("criterion ranks heads and neurons: say how many of them go first.")
        if self.allocation not in ALLOCATIONS:
            raise ParedownError(f"allocation is one of {', '.join(ALLOCATIONS)}.")
        if own is not None and self.allocation != "uniform":
            raise ParedownError(f"{pattern} has the same share of zeros everywhere: leave the allocation at uniform.")
        if self.permute and own is None:
            raise ParedownError(f"Permuting is for n:m patterns; {pattern} gains nothing by it.")
        registry.find("sparsity", self.solver)

    @property
    def zeroes(self) -> bool:
        """Whether weights are to be zeroed."""
        return bool(self.pattern)

    @property
    def share(self) -> float:
        """Of the weights of the layers, what is to be zero."""
        own = Pattern.parse(self.pattern).sparsity if self.pattern else None
        return own if own is not None else self.sparsity or 0.0

    @property
    def trains(self) -> bool:
        """Whether the smaller model is trained."""
        return self.recover in TRAINED and bool(self.minutes or self.steps)

    def cutting_first(self) -> Settings:
        """What is done before the first zero: the amounts cut at once and re-fitted."""
        zeros: dict[str, Any] = {name: _DEFAULT[name] for name in _OF_ZEROS}
        return replace(self, **zeros, rounds=1, recover="reconstruct", minutes=0.0, steps=None, target="")

    @property
    def cuts(self) -> bool:
        """Whether units are to go by amounts."""
        said = any(getattr(self, kind) for kind in (*KINDS, "channels"))
        return said or self.parameters is not None or self.macs is not None

    def _check_without_amount(self, names: tuple[str, ...]) -> None:
        """Raises ParedownError where one of the settings is given that say how an amount goes, and no amount is."""
        for name in names:
            if not self.sized and getattr(self, name) != _DEFAULT[name]:
                raise ParedownError(f"{name} goes with an amount: say how many heads, neurons or layers go.")

    def only_for(self, pictures: bool) -> None:
        """Raises ParedownError where a setting is given that is for text, or for `pictures`, alone."""
        if not pictures:
            self._check_without_amount(("criterion", "recover"))
        names, what = (_OF_TEXTS, "texts") if pictures else (_OF_PICTURES, "image classifiers")
        for name in names:
            if getattr(self, name) != _DEFAULT[name]:
                said = "an image classifier" if pictures else "none"
                raise ParedownError(f"{name.replace('_', '-')} is for {what}, and this model is {said}.")

    @property
    def sized(self) -> bool:
        """Whether it is said how much goes, of units or to zero."""
        return self.cuts or self.zeroes

    @property
    def shares(self) -> Shares:
        """What goes, by kind."""
        return Shares(**{kind: getattr(self, kind) for kind in KINDS})

    @property
    def dial(self) -> str:
        """Which of the budgets leads: "speedup", "latency_ms", "amount" or "max_drop"."""
        if self.sized:
            return "amount"
        if self.speedup is not None:
            return "speedup"
        return "latency_ms" if self.latency_ms is not None else "max_drop"

    @property
    def gate(self) -> float | None:
        """The largest drop that passes; None when only speed was asked for."""
        if self.max_drop is not None:
            return self.max_drop
        return DEFAULT_DROP if self.dial == "max_drop" else None

    def normalization(self) -> dict[str, tuple[float, ...] | None]:
        """What was said of the pictures."""
        return {"mean": self.mean, "std": self.std, "size": self.size}

    def columns(self) -> dict[str, str | None]:
        """The columns named, by what they hold; None where the file's own header decides."""
        return {name: getattr(self, name) for name in COLUMNS}

    def objective(self) -> dict[str, float | str | None]:
        """The dial, its value, and the largest drop that passes."""
        said = [f"{kind} {getattr(self, kind):g}" for kind in KINDS if getattr(self, kind)]
        said += [f"channels {self.channels:g}"] if self.channels else []
        kept = {"parameters": self.parameters, "macs": self.macs}
        said += [f"{name} kept {share:g}" for name, share in kept.items() if share is not None]
        said += [f"zeros {self.share:g}, {self.pattern}"] if self.zeroes else []
        values = {"speedup": self.speedup, "latency_ms": self.latency_ms, "max_drop": self.gate}
        value = ", ".join(said) if self.dial == "amount" else values[self.dial]
        return {"dial": self.dial, "value": value, "max_drop": self.gate}

    def command(self) -> str:
        """The command line that repeats the run."""
        words = ["paredown", "sparsify" if self.zeroes else "prune", self.model, "--data", self.data]
        words += ["--eval", self.eval] if self.eval else []
        if self.gate is not None:
            words += ["--max-drop", f"{self.gate * 100:g}%"]
        options = {
            "speedup": self.speedup,
            "latency-ms": self.latency_ms,
            "task": self.task,
            **{name.replace("_", "-"): column for name, column in self.columns().items()},
            **{kind: _said(getattr(self, kind)) for kind in KINDS},
            "parameters": self.parameters,
            "channels": _said(self.channels),
            "macs": self.macs,
            "weights": self.weights,
            **{
                name: value and ("x" if name == "size" else ",").join(f"{one:g}" for one in value)
                for name, value in self.normalization().items()
            },
            "minimum-channels": None if self.minimum_channels == 0.1 else self.minimum_channels,
            "multiple-of": self.multiple_of,
            "whole": self.whole,
            "layer-shares": self.layer_shares,
            **{
                name.replace("_", "-"): getattr(self, name)
                for name in _OF_AMOUNTS
                if self.cuts or getattr(self, name) != _DEFAULT[name]
            },
            **({name: getattr(self, name) for name in (*_OF_ZEROS[:-1], *_HOW)} if self.zeroes else {}),
            **{name.replace("_", "-"): None if getattr(self, name) == 1 else getattr(self, name) for name in _LEAST},
            "lora": self.lora or None,
            "steps": self.steps,
            "target": self.target or None,
            "tokens": self.tokens,
            "minutes": f"{self.minutes:g}",
            "confidence": None if self.confidence == 0.9 else self.confidence,
            "seed": self.seed or None,
            "threads": self.threads,
            "max-length": self.max_length,
            "out": self.out,
        }
        for name, value in options.items():
            words += [f"--{name}", f"{value}"] if value not in (None, "") else []
        switches = ("uniform", "permute", "by_sensitivity")
        words += [f"--{name.replace('_', '-')}" for name in switches if getattr(self, name)]
        words += [] if self.mirrored else ["--not-mirrored"]
        return shlex.join(words)


_GIVEN_WITH_AMOUNTS = ("rounds", "lora", "steps", "minimum_heads", "minimum_neurons")
_DEFAULT = {field.name: field.default for field in fields(Settings)}
_OF_AMOUNTS = ("criterion", "depth_criterion", "ranking", "protect", "rounds", "schedule", "recover")
_OF_ZEROS = ("pattern", "sparsity", "solver", "allocation", "permute")
_OF_PICTURES: tuple[str, ...] = ("weights", "mean", "std", "size", "channels", "macs", "minimum_channels")
_OF_PICTURES += ("multiple_of", "whole", "layer_shares", "by_sensitivity", "mirrored")
_OF_TEXTS: tuple[str, ...] = (*KINDS, *COLUMNS, "protect", "minimum_heads", "minimum_neurons", "depth_criterion")
_OF_TEXTS += ("pattern", "lora", "uniform", "tokens", "max_length")
_HOW = ("rounds", "schedule", "recover")
_LEAST = ("minimum_heads", "minimum_neurons")


def _amount(value: float) -> bool:
    return 0 <= value < 1 or (math.isfinite(value) and value >= 1 and value == int(value))


def _said(amount: float) -> str | None:
    """An amount as the command line takes it: "25%", or a number."""
    if not amount:
        return None
    return f"{amount:g}" if amount >= 1 else f"{100 * amount:g}%"


class Progress(Protocol):
    """Where long work tells how far it is."""

    def stage(self, name: str, total: float | None = None) -> None:
        """A new stage begins, and the one before is done; `total` is its amount of work, None where nobody knows."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """So much more of the stage's total is done; `note` replaces the note beside the bar unless it is empty."""

    def say(self, text: str) -> None:
        """Something the user should read; it stays on the screen."""


class Silent:
    """Progress that nobody looks at."""

    def stage(self, name: str, total: float | None = None) -> None:
        return None

    def advance(self, amount: float = 1, note: str = "") -> None:
        return None

    def say(self, text: str) -> None:
        return None
