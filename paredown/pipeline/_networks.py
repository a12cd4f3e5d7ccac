"""Everything a run on an image classifier starts from: the network traced and described, the pictures split.

Legend: N pictures, C classes.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from paredown import __version__, registry
from paredown.anatomy import describe_graph
from paredown.cores import cores
from paredown.errors import BadData, UnsupportedModel
from paredown.graph import trace
from paredown.layers import layers_of, macs
from paredown.networks import IMAGENET, LoadedNetwork, load_network
from paredown.pipeline._memory import at_once
from paredown.pipeline._prepare import evenly, too_few
from paredown.pipeline._settings import Settings
from paredown.targets import PICTURES
from paredown.tasks import image_classification as task
from paredown.tasks.image_classification import ImageData, ImageSplits, normalized
from paredown.types import Array, GraphAnatomy, Runner, canonical_json
from paredown.validation.machine import card

BATCH = 64  # pictures of a batch
TIMED_MACS = 1.6e10  # of an Offline pass: a fifth of a second on two cores
TIMED_SINGLES = 24
SCORED_MACS, MOST_SCORED = 1.6e11, 2048  # of the calibration pictures that score and re-fit; at least a batch of them
IN_ORDER = "The folders, whose names the network does not know, are taken for its classes in alphabetical order."
JUDGED_MACS, FEWEST_JUDGED = 4e13, 400  # of the pictures that judge a candidate


@dataclass(frozen=True)
class Pictured:
    """The dense network as a graph, its anatomy, and the three splits of pictures."""

    loaded: LoadedNetwork
    model: fx.GraphModule
    anatomy: GraphAnatomy
    splits: ImageSplits
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]
    task: Any = task

    @cached_property
    def macs(self) -> int:
        """Of one picture."""
        return macs(self.model)

    def pictures(self, data: ImageData) -> Array:
        """float32 [N, 3, H, W], as the network takes them."""
        return normalized(data.pixels, self.mean, self.std)

    def batches(self, data: ImageData, size: int = BATCH) -> list[Tensor]:
        """All pictures as the network takes them, in batches."""
        return list(torch.from_numpy(self.pictures(data)).split(size))

    @cached_property
    def scored(self) -> ImageData:
        """The calibration pictures that score units and re-fit layers."""
        count = min(MOST_SCORED, max(BATCH, int(SCORED_MACS / self.macs)))
        return self.splits.calibration.take(np.arange(min(count, len(self.splits.calibration))))

    @property
    def together(self) -> int:
        """How many processes that time its candidates may be alive at once."""
        return at_once(self.model)

    def answers(self, candidate: Any, part: str, threads: int | None) -> Array:
        """What a candidate answers to the "guardrail" or "test" pictures [N, C]."""
        data: ImageData = getattr(self.splits, part)
        if candidate.target == "torch":
            return self.outputs_of(candidate.model, data)
        runner = runners(candidate.target, Path(candidate.alternative.path), threads or cores())
        try:
            return self.outputs(runner, data)
        finally:
            runner.close()

    def dense_answers(self, part: str) -> Array:
        """What the dense network answers to them."""
        return self.outputs_of(self.model, getattr(self.splits, part))

    def timing(self) -> tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]]:
        """The batches of 64 pictures that are timed (fewer where a network is large), and single pictures."""
        data = self.splits.guardrail
        size = min(BATCH, len(data), max(4, int(TIMED_MACS / self.macs)))
        count = max(1, min(2, len(data) // size))
        chosen = [data.take(part) for part in np.arange(count * size).reshape(count, size)]
        chosen += [data.take([i]) for i in evenly(np.arange(len(data)), TIMED_SINGLES)]
        arrays: list[Mapping[str, Array]] = [{PICTURES: self.pictures(one)} for one in chosen]
        return arrays[:count], arrays[count:]

    def outputs(self, runner: Runner, data: ImageData) -> Array:
        """Logits [N, C]."""
        found = []
        for start in range(0, len(data), BATCH):
            part = data.take(np.arange(start, min(start + BATCH, len(data))))
            found.append(next(iter(runner.run({PICTURES: self.pictures(part)}).values())))
        return np.concatenate(found)

    def outputs_of(self, model: fx.GraphModule, data: ImageData) -> Array:
        """The same of a graph on torch."""
        with torch.inference_mode():
            return np.concatenate([model(x).float().numpy() for x in self._streamed(data)])

    def _streamed(self, data: ImageData) -> Any:
        for start in range(0, len(data), BATCH):
            yield torch.from_numpy(self.pictures(data.take(np.arange(start, min(start + BATCH, len(data))))))


def prepare_network(settings: Settings, *, given: LoadedNetwork | None = None) -> Pictured:
    """Reads and checks all input. Raises UnsupportedModel or BadData before any long work has begun."""
    loaded = given or load_network(settings.model, weights=settings.weights)
    size = settings.size if settings.size is not None else loaded.size
    look = partial(task.load, middle=loaded.middle)
    data = look(settings.data, part="train", size=size)
    evaluation = look(settings.eval, part="test", size=size or data.pixels.shape[1:3]) if settings.eval else None
    data = named_alike(data, loaded)
    evaluation = None if evaluation is None else named_alike(evaluation, loaded)
    splits = task.split(data, evaluation, seed=settings.seed)
    notes = list(splits.notes)
    mean, std = settings.mean or loaded.mean, settings.std or loaded.std
    if mean is None or std is None:
        notes.append("Pictures are normalized with ImageNet's mean and deviation: --mean and --std say otherwise.")
        mean, std = mean or IMAGENET[0], std or IMAGENET[1]
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise BadData(f"mean and std are three numbers each, std above 0; got {mean} and {std}")
    example = torch.from_numpy(normalized(data.pixels[:2], mean, std))
    model = trace(loaded.module, example)
    _check_answers(model, example, data, loaded)
    anatomy = describe_graph(model)
    if not anatomy.groups:
        why = next(iter(anatomy.whole.values()), "it has no layers")
        raise UnsupportedModel(f"nothing of {loaded.source} can be cut: {why}")
    found = Pictured(loaded, model, anatomy, splits, mean, std, ())
    parts: dict[str, Any] = {}
    for name in ("guardrail", "test"):
        part: ImageData = getattr(splits, name)
        count = max(FEWEST_JUDGED, int(JUDGED_MACS / found.macs))
        if count < len(part):
            notes.append(f"{count} of {len(part)} {name} pictures are used: the network is large.")
            part = part.take(np.arange(count))
        parts[name] = part
    notes += filter(None, [too_few(settings, found.task, parts["guardrail"])])
    return replace(found, splits=replace(splits, **parts), notes=tuple(notes))


def named_alike(data: ImageData, loaded: LoadedNetwork) -> ImageData:
    """The pictures with labels as the network numbers its classes, where both have names.

    Folders of a network that names none of its classes, or of which none has a name of the network's and that are as
    many as its classes, are its classes in alphabetical order: so are ImageNet's, which are named by WordNet's numbers.
    """
    if not data.classes or data.classes == loaded.labels:
        return data
    if not loaded.labels:
        return replace(data, notes=(*data.notes, IN_ORDER))
    strange = [name for name in data.classes if name not in loaded.labels]
    if len(strange) == len(data.classes) == len(loaded.labels):
        return replace(data, classes=loaded.labels, notes=(*data.notes, IN_ORDER))
    if strange:
        known = ", ".join(loaded.labels[:5])
        raise BadData(f"the class {strange[0]!r} is none of the network's {len(loaded.labels)}: {known}, ...")
    number = np.array([loaded.labels.index(name) for name in data.classes])
    return replace(data, labels=number[data.labels], classes=loaded.labels)


def _check_answers(model: fx.GraphModule, example: Tensor, data: ImageData, loaded: LoadedNetwork) -> None:
    with torch.inference_mode():
        answer = model(example)
    if answer.ndim != 2:
        raise UnsupportedModel(f"{loaded.source} gives {list(answer.shape)} for 2 pictures, and [2, classes] is wanted")
    if not torch.isfinite(answer).all():
        raise UnsupportedModel(f"The outputs of {loaded.source} on pictures are not finite numbers.")
    check_classes(data, loaded, answer.shape[1])


def check_classes(data: ImageData, loaded: LoadedNetwork, answers: int) -> None:
    """Raises UnsupportedModel or BadData unless the names of classes, and the labels, are of so many answers."""
    if loaded.labels and len(loaded.labels) != answers:
        raise UnsupportedModel(f"{loaded.source} names {len(loaded.labels)} classes and gives {answers} answers")
    if data.classes and len(data.classes) != answers:
        raise BadData(
            f"there are folders of {len(data.classes)} classes, and the network has {answers}, without names: all must "
            "be there, since they are taken in alphabetical order"
        )
    if data.labels.max() >= answers:
        raise BadData(f"the data has the label {data.labels.max()}, and the network has {answers} classes")


def network_key(settings: Settings, prepared: Pictured) -> str:
    """Names a run by all that its results depend on; see `run_key`."""
    machine = card()
    nowhere = replace(settings, model="", data="", eval=None, out="", weights=None)
    about = [nowhere, __version__, machine["libraries"], machine["cpu"], machine["cores"], prepared.anatomy.fingerprint]
    about += [prepared.mean, prepared.std]
    found = hashlib.sha256(canonical_json(about).encode())
    for part in (prepared.splits.calibration, prepared.splits.guardrail, prepared.splits.test):
        found.update(np.ascontiguousarray(part.pixels).tobytes())
        found.update(part.labels.tobytes())
    for tensor in prepared.model.state_dict().values():
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def runners(target: str, path: Path, threads: int) -> Runner:
    """A runner of an ONNX file on a target."""
    found: Runner = registry.find("targets", target).load(path, threads=threads)
    return found


def installed(target: str) -> bool:
    return importlib.util.find_spec(target) is not None


def first_groups(prepared: Pictured) -> tuple[str, ...]:
    """The groups of the channels that the first layer makes; none where those stay whole anyway."""
    first = next((layer.weight for layer in layers_of(prepared.model)), "")
    parts = {group.name: group.slices for group in prepared.anatomy.channels}
    return tuple(name for name, own in parts.items() if any((one.tensor, one.axis) == (first, 0) for one in own))
