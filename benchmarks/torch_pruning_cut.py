"""Cuts of the CIFAR ResNets by Torch-Pruning 1.6.1, which is installed into a folder of its own where it is asked for.

It does not follow option A shortcuts, a slice with zeros around it: it cuts the two sides of an addition to different
widths, and the network no longer runs (`as_it_is` says with what words). There are two ways around that, by its own
documentation: to ignore the layers that write into the residual stream, so that only what lies inside a block is cut;
and to give it the shortcut as a customized layer, with functions that cut its inputs and outputs.
"""

from __future__ import annotations

import copy
import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

VERSION = "1.6.1"
SCOPES = ("inside blocks", "all")
RANKINGS: Mapping[str, dict[str, bool]] = {
    "local": {},  # its default
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}
HALVINGS = 12


def install(work: Path) -> str:
    """Makes `import torch_pruning` work and gives its version; what it needs, torch and numpy, is there already."""
    folder = work / f"torch-pruning-{VERSION}"
    if not folder.exists():
        beside = folder.with_suffix(".part")
        asked = ["--quiet", "--no-deps", "--upgrade", "--target", str(beside), f"torch-pruning=={VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", "install", *asked], check=True)
        beside.rename(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.metadata.version("torch-pruning")


class Shortcut(nn.Module):
    """Option A as a layer: output i is input `source[i]` at every other place, or zero where that is past the last."""

    source: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        source, first = torch.full((outputs,), inputs), (outputs - inputs) // 2
        source[first : first + inputs] = torch.arange(inputs)
        self.inputs = inputs
        self.register_buffer("source", source)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 1)).index_select(1, self.source)

    def cut_outputs(self, gone: list[int]) -> None:
        self.source = self.source[_others(len(self.source), gone)]

    def cut_inputs(self, gone: list[int]) -> None:
        stay = _others(self.inputs, gone)
        places = torch.full((self.inputs + 1,), len(stay))
        places[stay] = torch.arange(len(stay))
        self.source, self.inputs = places[self.source], len(stay)


def _others(count: int, gone: list[int]) -> list[int]:
    return sorted(set(range(count)) - set(gone))


class _Block(nn.Module):
    """A residual block whose shortcut is a layer."""

    def __init__(self, block: Any):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.shortcut = Shortcut(block.conv1.in_channels, block.conv1.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def as_it_is(dense: nn.Module, x: Tensor) -> str:
    """What comes of the network as its user brings it, with nothing ignored but the classifier: "" if it runs."""
    module: Any = copy.deepcopy(dense)
    try:
        _step(module, x, 0.3, [module.linear], None, "l2", {})
        module(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def nearest(
    dense: nn.Module,
    x: Tensor,
    macs: float,
    *,
    scope: str,
    ranking: str,
    criterion: str,
    gradients: Mapping[str, Tensor],
) -> tuple[nn.Module, float]:
    """The cut network whose multiply-accumulates are nearest to so many, and the pruning ratio that gave it."""
    found: list[tuple[float, float, nn.Module]] = []
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        small = _cut(dense, x, middle, scope=scope, ranking=ranking, criterion=criterion, gradients=gradients)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(x)
        own = counter.get_total_flops() / 2 / len(x)
        found.append((abs(own - macs), middle, small))
        low, high = (middle, high) if own > macs else (low, middle)
    _, ratio, small = min(found, key=lambda one: one[:2])
    return small, ratio


def _cut(
    dense: nn.Module,
    x: Tensor,
    ratio: float,
    *,
    scope: str,
    ranking: str,
    criterion: str,
    gradients: Mapping[str, Tensor],
) -> nn.Module:
    import torch_pruning as tp

    module: Any = copy.deepcopy(dense)
    stages = (module.layer1, module.layer2, module.layer3)
    ignored, customized = [module.linear], None
    if scope == "inside blocks":
        ignored += [module.conv1, *(block.conv2 for stage in stages for block in stage)]
    else:
        for stage in stages[1:]:
            stage[0] = _Block(stage[0])

        class CutShortcut(tp.pruner.function.BasePruningFunc):
            def prune_out_channels(self, layer: Shortcut, idxs: list[int]) -> Shortcut:
                layer.cut_outputs(idxs)
                return layer

            def prune_in_channels(self, layer: Shortcut, idxs: list[int]) -> Shortcut:
                layer.cut_inputs(idxs)
                return layer

            def get_out_channels(self, layer: Shortcut) -> int:
                return len(layer.source)

            def get_in_channels(self, layer: Shortcut) -> int:
                return layer.inputs

        customized = {Shortcut: CutShortcut()}
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    _step(module, x, ratio, ignored, customized, criterion, RANKINGS[ranking])
    module.zero_grad()
    return module.eval()


def _step(
    module: nn.Module,
    x: Tensor,
    ratio: float,
    ignored: list[Any],
    customized: Any,
    criterion: str,
    how: dict[str, bool],
) -> None:
    import torch_pruning as tp

    importances = {"l2": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    asked = {"pruning_ratio": ratio, "ignored_layers": ignored, "customized_pruners": customized, **how}
    tp.pruner.BasePruner(module, x, importance=importances[criterion](), **asked).step()
