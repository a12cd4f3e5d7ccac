"""Convolutional networks side by side with Torch-Pruning.

python benchmarks/cnn.py --networks resnet20 --shares 0.5 --steps 5 --pictures 300  # in small; nothing is recorded
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cnn_convolution
import numpy as np
import torch_pruning_cut as theirs

sys.path.append(str(Path(__file__).parent.parent / "tests" / "real"))  # cifar_resnet, the network as a user has it

NETWORKS = ("resnet56", "resnet20")
SHARES = (0.75, 0.5)
CRITERIA = ("l2", "taylor")
STEPS = 140  # of training, twice over all pictures, by the first criterion; by the second they are cut and re-fitted
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCORED, REFITTED = 512, 1024  # pictures
JUDGED = 512  # the last pictures, which choose between two of our plans


class _Case:
    """One network with all that both tools are given."""

    def __init__(self, assets: Path, name: str, criterion: str, pictures: int | None):
        import cifar_resnet
        import torch
        import torch.nn.functional as F
        from safetensors.torch import load_file

        from paredown.anatomy import describe_graph
        from paredown.graph import trace
        from paredown.importance import score_channels
        from paredown.layers import places_of
        from paredown.planning import Product
        from paredown.tasks import image_classification as task

        archive = assets / "data/cifar10/cifar10.npz"
        self.train, self.test = (task.load(archive, part=part) for part in ("train", "test"))
        if pictures is not None:
            self.train, self.test = self.train.take(range(pictures)), self.test.take(range(pictures))
        self.module = getattr(cifar_resnet, name)().eval()
        self.module.load_state_dict(load_file(assets / f"models/cifar10-{name}/model.safetensors"))
        self.pictures = self._normalized(self.train.pixels[:REFITTED])
        self.judging = self._normalized(self.train.pixels[-JUDGED:])
        scored = torch.cat(self.pictures)[:SCORED]
        labels = torch.from_numpy(self.train.labels[: len(scored)])
        self.name, self.criterion = name, criterion
        self.gradients: dict[str, Any] = {}
        if criterion == "taylor":
            F.cross_entropy(self.module(scored), labels).backward()
            self.gradients = {name: one.grad for name, one in self.module.named_parameters()}
            self.module.zero_grad()
        self.dense = trace(self.module, self.pictures[0])
        self.anatomy = describe_graph(self.dense)
        self.scores = score_channels(self.dense, self.anatomy, criterion, scored.split(64), labels.split(64))
        self.products = [Product(name, shape, places) for name, (shape, places) in places_of(self.dense).items()]

    def _normalized(self, pixels: Any) -> Sequence[Any]:
        import torch

        from paredown.tasks.image_classification import normalized

        return torch.from_numpy(normalized(pixels, MEAN, STD)).split(64)

    def answers(self, model: Any) -> Any:
        """[N, C], of the test pictures."""
        import torch

        with torch.inference_mode():
            return torch.cat([model(x) for x in self._normalized(self.test.pixels)]).numpy()

    def divergence(self, model: Any) -> float:
        """KL(dense || model) in nats a picture, on pictures that neither scored nor re-fitted."""
        import torch

        from paredown.pipeline import _network_table

        with torch.inference_mode():
            return _network_table.divergence(model, self.judging, [self.dense(x).log_softmax(1) for x in self.judging])

    def accuracy(self, answers: Any) -> float:
        return float((answers.argmax(1) == self.test.labels).mean())


@dataclass
class _Made:
    """A cut network on its way, what it answers by what was done to it, and the `facts` that are recorded."""

    name: str
    scope: str
    model: Any
    answers: dict[str, Any]
    facts: dict[str, Any]
    plan: Any = None


def side_by_side(
    assets: Path,
    work: Path,
    *,
    networks: Sequence[str] = NETWORKS,
    shares: Sequence[float] = SHARES,
    criteria: Sequence[str] = CRITERIA,
    recorded: Collection[str] = (),
    steps: int = STEPS,
    pictures: int | None = None,
    rounds: int = 15,
) -> Iterator[dict[str, Any]]:
    """A record for each criterion, network and share of its multiply-accumulates.

    Torch-Pruning is asked first, by each of its rankings; where two differ, the one that is more accurate on the test
    pictures right after the cut stands for it. Ours then gets the multiply-accumulates that theirs has. What is trained
    goes on where a run that was stopped left it.
    """
    import torch

    from paredown.cores import cores
    from paredown.validation.machine import card

    torch.set_num_threads(cores())
    version = theirs.install(work)
    for criterion in criteria:
        for name in networks:
            left = [share for share in shares if _step(name, share, criterion) not in recorded]
            case = _Case(assets, name, criterion, pictures) if left else None
            for share in left if case else ():
                about = {"network": name, "share": share, "criterion": criterion, "version": version}
                budget = steps if criterion == criteria[0] else 0
                found = _compared(case, share, budget, work, rounds)
                yield {"step": _step(name, share, criterion), **about, "steps": budget, **found, "machine": card()}


def _step(name: str, share: float, criterion: str) -> str:
    return f"{name} {share:g} {criterion}"


def _compared(case: _Case, share: float, steps: int, work: Path, rounds: int) -> dict[str, Any]:
    from paredown.layers import macs

    answers = case.answers(case.dense)
    dense = _Made("dense", "", case.dense, {}, {"trained": case.accuracy(answers)})
    made, tried, checkpoints = [], [], []
    for scope in theirs.SCOPES:
        rivals = _torch_pruning(case, share * macs(case.dense), scope)
        tried += [{"scope": scope, **rival.facts} for rival in rivals]
        best = max(rivals, key=lambda rival: rival.facts["cut"])
        made += [best, _paredown(case, macs(best.model), scope)]
    for one, other in zip(made[1::2], made[::2], strict=True):
        one.facts["untrained_lead"] = _lead(case, one.answers["right after"], other.answers["right after"])
    for one in made if steps else ():
        path = work / f"cnn-{case.name}-{share:g}-{_digest(one.model)}.safetensors"
        checkpoints += [path, path.with_suffix(".led.safetensors")]
        _train(case, one, steps, *checkpoints[-2:])
    for one, other in zip(made[1::2], made[::2], strict=True) if steps else ():
        one.facts["lead"] = _lead(case, one.answers["trained"], other.answers["trained"])
        one.facts["led_lead"] = _lead(case, one.answers["led"], other.answers["trained"])
    timed = _timed([dense, *made], work, rounds)
    rows = []
    for one in (dense, *made):
        counts = {"macs": macs(one.model), "parameters": sum(value.numel() for value in one.model.parameters())}
        about = {"tool": one.name, "scope": one.scope, **counts, "channels": _channels(one.model)}
        rows.append({**about, **one.facts, **timed[_label(one)]})
    for path in checkpoints:
        path.unlink(missing_ok=True)
    said = theirs.as_it_is(case.module, case.pictures[0][:2])
    return {"as_it_is": said, "tried": tried, "rows": rows, "pictures": len(case.test), "learnt_from": len(case.train)}


def _torch_pruning(case: _Case, macs: float, scope: str) -> list[_Made]:
    """A cut by each of its rankings."""
    from paredown.graph import trace
    from paredown.layers import macs as count

    found = []
    for ranking in theirs.RANKINGS:
        how = {"scope": scope, "ranking": ranking, "criterion": case.criterion, "gradients": case.gradients}
        module, ratio = theirs.nearest(case.module, case.pictures[0][:2], macs, **how)
        model = trace(module, case.pictures[0])
        answers = case.answers(model)
        facts = {"ranking": ranking, "ratio": ratio, "share_of_macs": count(model) / count(case.dense)}
        facts["cut"] = case.accuracy(answers)
        found.append(_Made("torch-pruning", scope, model, {"right after": answers}, facts))
    return found


def _paredown(case: _Case, macs: float, scope: str) -> _Made:
    """At most so many multiply-accumulates, re-fitted."""
    from paredown.layers import macs as count
    from paredown.planning import aligned_plan
    from paredown.recovery import refit_graph
    from paredown.surgery import cut_graph
    from paredown.types import Budget

    budget = Budget("macs", min(1.0, macs / count(case.dense)))
    found = []
    for protect in (case.anatomy.streams, ()) if scope == "all" else (case.anatomy.streams,):
        plan = aligned_plan(case.anatomy, case.scores, budget, case.products, protect=protect)
        small = cut_graph(case.dense, case.anatomy, plan)
        model = refit_graph(small, teacher=case.dense, anatomy=case.anatomy, plan=plan, pictures=case.pictures)
        answers = case.answers(model)
        facts = {
            **{"ranking": "global", "streams": "whole" if protect else "cut"},
            **{"share_of_macs": count(model) / count(case.dense), "divergence": case.divergence(model)},
            **{"cut": case.accuracy(case.answers(small)), "refitted": case.accuracy(answers)},
        }
        found.append(_Made("paredown", scope, model, {"right after": answers}, facts, plan))
    return min(found, key=lambda one: float(one.facts["divergence"]))


def _train(case: _Case, one: _Made, steps: int, checkpoint: Path, led: Path) -> None:
    """As both tools' networks are trained; ours then also `led`, by its plan, to what the dense one's layers read."""
    from paredown.recovery import train_on_pictures

    told: dict[str, Any] = {"teacher": case.dense, "data": case.train, "mean": MEAN, "std": STD, "steps": steps}
    model, history = train_on_pictures(one.model, **told, checkpoint=checkpoint)
    one.answers["trained"] = case.answers(model)
    one.facts |= {"trained": case.accuracy(one.answers["trained"]), "seconds": history[-1].seconds}
    if one.plan is not None:
        model, _ = train_on_pictures(one.model, **told, anatomy=case.anatomy, plan=one.plan, checkpoint=led)
        one.answers["led"] = case.answers(model)
        one.facts["led"] = case.accuracy(one.answers["led"])
    one.model = model


def _lead(case: _Case, ours: Any, others: Any) -> dict[str, float]:
    """By how much more of the test pictures are right, with its interval at 95 %: both see the same pictures."""
    from paredown.tasks import image_classification
    from paredown.validation.quality import paired_drop

    found: Any = paired_drop(image_classification, ours, others, case.test)  # type: ignore[arg-type]
    return vars(found.interval)


def _timed(made: Sequence[_Made], work: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Of 64 pictures and of one on ONNX Runtime, all networks in turn: milliseconds, times dense, times the rival."""
    from paredown.cores import cores
    from paredown.pipeline import _loaders
    from paredown.targets import export_graph
    from paredown.validation import timing

    paths = [export_graph(one.model, work / f"cnn-{number}.onnx") for number, one in enumerate(made)]
    engines = [timing.Alternative(_label(one), _loaders.ONNX, str(path)) for one, path in zip(made, paths, strict=True)]
    x = np.random.default_rng(0).standard_normal((64, 3, 32, 32), dtype=np.float32)
    many, single = {"pixel_values": x}, {"pixel_values": x[:1]}
    taken = timing.measure(engines, [many] * 2, singles=[single] * 16, rounds=rounds, threads=cores())
    found = {}
    for number, one in enumerate(made):
        its, dense = taken[_label(one)], taken[_label(made[0])]
        facts = {
            "batch_64_ms": 1e3 * float(np.median(its.offline_seconds)) / 2,
            "single_ms": float(np.median(its.single_ms)),
            "speedup": vars(timing.ratio(dense, its)),
            "single_speedup": vars(timing.latency_ratio(dense, its)),
        }
        if one.name == "paredown":
            rival = taken[_label(made[number - 1])]
            facts["ahead"] = vars(timing.ratio(rival, its))
            facts["single_ahead"] = vars(timing.latency_ratio(rival, its))
        found[_label(one)] = facts
    for path in paths:
        path.unlink()
    return found


def _label(one: _Made) -> str:
    return f"{one.name} {one.scope}".strip()


def _channels(model: Any) -> list[int]:
    """What each convolution makes, in the order in which they run."""
    from paredown.layers import layers_of

    return [len(model.get_parameter(layer.weight)) for layer in layers_of(model) if layer.kind != "linear"]


def _digest(model: Any) -> str:
    """Tells networks apart by their tensors."""
    state = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        state.update(name.encode() + value.numpy().tobytes())
    return state.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description="The side-by-side benchmark in small; nothing is recorded.")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=CRITERIA)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--convolution", action="store_true", help="the one convolution instead")
    asked = vars(parser.parse_args())
    work = Path(__file__).parent / "work"
    work.mkdir(exist_ok=True)
    if asked.pop("convolution"):
        print(json.dumps(cnn_convolution.measure(work, rounds=asked["rounds"])))
        return 0
    for record in side_by_side(Path(os.environ["PAREDOWN_ASSETS"]).resolve(), work, **asked):
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
