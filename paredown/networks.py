"""Image classifiers as users bring them: a function of theirs with a file of weights, or a folder of transformers."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from paredown.errors import UnsupportedModel
from paredown.models import silenced

IMAGE_CLASSIFICATION = "image-classification"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # means and deviations that most networks were trained with
CONVNEXT_WHOLE = 384  # the edge from which ConvNeXt's preprocessor, which ResNets have too, crops nothing (`crop_pct`)


@dataclass(frozen=True)
class LoadedNetwork:
    """A network in eval mode; pictures are normalized with `mean` and `std`, and have the `size` (height, width), where
    either is known. `middle` is the share of a picture's shorter side that is looked at, the rest being border.
    """

    source: str
    module: nn.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    labels: tuple[str, ...] = ()
    middle: float = 1.0


def is_network(name: str, task: str | None = None) -> bool:
    """Whether `name` stands for an image classifier: "package.module:factory", a folder whose first architecture is
    one, or whatever the `task` says is one.
    """
    path = Path(name).expanduser()
    if task == IMAGE_CLASSIFICATION or (":" in name and not path.exists()):
        return True
    try:
        config: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return str(config["architectures"][0]).endswith("ForImageClassification")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def load_network(name: str, *, weights: str | Path | None = None) -> LoadedNetwork:
    """The network that `name` stands for: "package.module:factory", a function without arguments that gives a module,
    with its `weights` in a safetensors file; or the folder of a transformers image classifier.

    Modules are looked for in the working directory too. Raises UnsupportedModel with the reason.
    """
    if ":" in name and not Path(name).exists():
        return LoadedNetwork(name, _made(name, weights))
    if weights is not None:
        raise UnsupportedModel(
            f"{name} is a folder, with weights of its own; --weights goes with package.module:factory"
        )
    return _of_transformers(Path(name).expanduser())


def _made(name: str, weights: str | Path | None) -> nn.Module:
    place, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(place)
        for part in function.split("."):
            found = getattr(found, part)
        module = found()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedModel(f"{name} gives no network: {type(error).__name__}: {reason}") from error
    if not isinstance(module, nn.Module):
        raise UnsupportedModel(f"{name} gives a {type(module).__name__}, and a torch.nn.Module is wanted")
    if weights is None:
        raise UnsupportedModel(f"{name} needs its weights: name a safetensors file with --weights")
    path = Path(weights).expanduser()
    if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
        convert = "import torch, safetensors.torch as s; "
        convert += f"s.save_file(torch.load('{path}', weights_only=True), 'weights.safetensors')"
        raise UnsupportedModel(f'{path} is a pickle, which Paredown never opens; convert it: python -c "{convert}"')
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnsupportedModel(f"{path} is not a readable safetensors file: {error}") from None
    if any(nn.parameter.is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise UnsupportedModel(f"{name} gives a network with lazy modules: let it run once on an example in {function}")
    own = module.state_dict()
    counts = {key for key in own if key.endswith("num_batches_tracked")}  # nothing reads them
    missing, strange = sorted(own.keys() - state.keys() - counts), sorted(state.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    for keys, what in ((missing, "lacks"), (strange, "has, and the network has not,"), (wrong, "has in another shape")):
        if keys:
            raise UnsupportedModel(f"{path} {what} {keys[0]!r} ({len(keys)} such tensors)")
    module.load_state_dict(state, strict=False)
    return module.float().eval()


class _Logits(nn.Module):
    """A transformers classifier as a function of its pictures alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def _of_transformers(folder: Path) -> LoadedNetwork:
    from transformers import AutoConfig, AutoModelForImageClassification

    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} is no model folder: it holds no config.json")
    if not (folder / "model.safetensors").is_file():
        raise UnsupportedModel(f"{folder} holds no model.safetensors")
    try:
        with silenced():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model, info = AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UnsupportedModel(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UnsupportedModel(f"{folder} lacks weights: no tensor {missing[0]!r} ({len(missing)} missing)")
    told = _preprocessing(folder / "preprocessor_config.json")
    names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    names = () if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names  # nobody named them
    return LoadedNetwork(str(folder), _Logits(model.eval()).eval(), labels=names, **told)


def _preprocessing(path: Path) -> dict[str, Any]:
    """The `mean`, `std`, `size` and `middle` of a model's preprocessor; what it does not say is left out."""
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        cropped = told.get("do_center_crop", True)
        size, crop = _size(told.get("size")), _size(told.get("crop_size")) if cropped else None
        middle = 1.0
        if size and crop:
            middle = min(1.0, min(crop) / min(size))
        elif size and told.get("crop_pct") and min(size) < CONVNEXT_WHOLE:
            middle = float(told["crop_pct"])
        mean, std = (tuple(map(float, told[key])) if told.get(key) else None for key in ("image_mean", "image_std"))
        if not told.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        largest = 255 * float(told.get("rescale_factor", 1 / 255) if told.get("do_rescale", True) else 1.0)
        mean, std = (one and tuple(value / largest for value in one) for one in (mean, std))  # of pixels from 0 to 1
        return {"mean": mean, "std": std, "size": crop or size, "middle": middle}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"{path} cannot be read: {error}") from None


def _size(told: Any) -> tuple[int, int] | None:
    """(height, width) of what a preprocessor calls a size: a number, or a dictionary of one edge or of both."""
    if isinstance(told, dict):
        edge = told.get("shortest_edge")
        height, width = told.get("height", edge), told.get("width", edge)
        return None if height is None or width is None else (int(height), int(width))
    return None if told is None else (int(told), int(told))
