"""The tensors of a bundle: what is written of a model, and how they get back into one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from paredown.bundle._compressed import expanded
from paredown.bundle._format import WEIGHTS
from paredown.errors import CorruptBundle, FingerprintMismatch


def tensors_of(model: nn.Module, unused: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, on the CPU, floats in fp32; and by name those left out because they share another's memory.

    Modules named in `unused` are left out altogether: opening a bundle drops them.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in model.state_dict().items():
        if any(name.startswith(f"{module}.") for module in unused):
            continue
        # All empty tensors have the address 0 and share nothing.
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        plain = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None).contiguous()
        # A part of a larger memory would make safetensors refuse it, or write the whole.
        tensors[name] = plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()
    return tensors, tied


def check_shapes(shell: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises FingerprintMismatch where tensors are not those of `shell`, what the plan leaves of the dense model."""
    expected = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise FingerprintMismatch(
                f"the model is not what the plan leaves of the dense one: {name} has shape "
                f"{found.get(name, 'none')}, the plan gives {expected.get(name, 'none')}"
            )


def with_tied(tensors: Mapping[str, Any], tied: Mapping[str, str]) -> dict[str, Any]:
    """Every tensor by name, those that share memory under each of their names."""
    return {**tensors, **{name: tensors[source] for name, source in tied.items()}}


def stored(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the bundle in the folder, with their zeros, tied ones once. Raises whatever makes them unreadable,
    for `reading` to word.
    """
    return expanded(load_file(folder / WEIGHTS), manifest.get("compressed", {}))


def assign(model: nn.Module, state: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Puts the tensors into a model that has none, in place; raises as `stored` does."""
    # One Parameter object for every name that shares it: loading by assignment then ties them again.
    own = {name: nn.Parameter(state[name]) for name, _ in model.named_parameters() if name in state}
    model.load_state_dict(with_tied({**state, **own}, tied), strict=True, assign=True)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns what damaged weights make safetensors and torch raise into one sentence."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CorruptBundle(f"{folder / WEIGHTS} does not hold the weights of this bundle's model: {reason}") from None
