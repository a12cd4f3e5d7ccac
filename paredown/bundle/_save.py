"""A bundle written: beside its place first, then renamed, so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from paredown import __version__
from paredown.bundle._compressed import compressed
from paredown.bundle._format import (
    FORMAT,
    MANIFEST,
    PLAN,
    REPORT,
    SERVING,
    TOKENIZER,
    TOKENS,
    WEIGHTS,
    digest_of,
    file_names,
    is_inside,
    old_place,
    pretty,
    read_manifest,
    sha256,
)
from paredown.bundle._load import Bundle, build_shell
from paredown.errors import BadData, FingerprintMismatch, ParedownError
from paredown.models import CAUSAL_LM, LoadedModel, save_tokenizer
from paredown.types import Anatomy, Plan, TokenPolicy, canonical_json


def save(
    folder: str | Path,
    *,
    model: PreTrainedModel,
    anatomy: Anatomy,
    plan: Plan,
    loaded: LoadedModel,
    target: str,
    precision: str = "fp32",
    accepted: bool,
    folds: Sequence[str] = (),
    tokens: TokenPolicy | None = None,
    token_tensors: Mapping[str, Tensor] | None = None,
    files: Mapping[str, Path] | None = None,
    report: Mapping[str, Any] | None = None,
) -> Bundle:
    """The bundle of the cut `model`, written at `folder`, where it appears whole or not at all.

    `loaded` is the dense model that `anatomy` describes and `plan` cuts; `tokens` the policy by which it drops tokens
    while it runs, with the tensors that it has learnt; `files` maps names inside the bundle
    ("model.onnx", "report.html") to files that are moved in once all is written. A bundle that lies at `folder` is
    replaced after the new one is whole; until then it is untouched. Raises `FingerprintMismatch` when the model's
    tensors are not what the plan leaves, `BadData` when the folder is taken, `ParedownError` when it cannot be written.
    """
    place, moved = Path(folder).expanduser().resolve(), dict(files or {})
    check_free(place)
    config = {key: value for key, value in loaded.config.to_dict().items() if key != "_name_or_path"}
    manifest: dict[str, Any] = {
        "format": 1 if tokens is None else 2,
        "paredown": __version__,
        "task": loaded.task,
        "family": anatomy.family,
        "config": config,
        "pooling": anatomy.layout.pooling,
        "normalize": anatomy.layout.normalize,
        "labels": loaded.labels,
        "max_length": loaded.max_length,
        "folds": list(folds),
        "plan_id": plan.id,
        "target": target,
        "precision": precision,
        "file": _serving_file(target, precision, moved),
        "accepted": accepted,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if tokens is not None:
        manifest["tokens"] = json.loads(tokens.to_json())
    if loaded.task == CAUSAL_LM:
        manifest["generation"] = cast(Any, loaded.model).generation_config.to_diff_dict()
    manifest = json.loads(canonical_json(manifest))  # as it will be read: the config's integer keys become text
    shell, own = build_shell(manifest, plan)
    tensors, manifest["tied"] = _tensors(model, own.layout.unused)
    _check_shapes(shell, {**tensors, **{name: tensors[source] for name, source in manifest["tied"].items()}})
    tensors, shapes = compressed(tensors)
    if shapes:
        manifest |= {"format": FORMAT, "compressed": shapes}

    part = place.with_name(f".{place.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, source in moved.items():
            _take(Path(source), part / name)
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        if token_tensors:
            save_file({name: tensor.contiguous() for name, tensor in token_tensors.items()}, part / TOKENS)
        longest = None if loaded.task == CAUSAL_LM else loaded.max_length
        save_tokenizer(loaded.tokenizer, part / TOKENIZER, max_length=longest)
        (part / PLAN).write_text(plan.to_json(), encoding="utf-8")
        if report is not None:
            (part / REPORT).write_text(pretty(json.loads(canonical_json(report))), encoding="utf-8")
        manifest["files"] = {name: sha256(part / name) for name in file_names(part)}
        manifest["self"] = digest_of(manifest)
        (part / MANIFEST).write_text(pretty(manifest), encoding="utf-8")
        _settle(part)
        _swap(part, place)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if _disk_full(error):
            raise ParedownError(
                f"the disk is full: the bundle was not written to {place}, and nothing there was changed; make room"
            ) from error
        if isinstance(error, OSError):
            raise ParedownError(f"the bundle cannot be written to {place}: {error.strerror or error}") from error
        raise
    for source in moved.values():
        if not Path(source).resolve().is_relative_to(place):
            with contextlib.suppress(OSError):  # the bundle is whole, and a file that was left behind is only a copy
                Path(source).unlink()
    return Bundle(place, manifest, plan)


def check_free(folder: str | Path) -> None:
    """Nothing, when a bundle may be written at `folder`: it is not there yet, or is empty, or holds a bundle.

    Raises `BadData` with the reason when it may not, so that hours of work do not end in a refusal.
    """
    place = Path(folder).expanduser().resolve()
    if place.exists() and not place.is_dir():
        raise BadData(f"{place} is a file; name a folder for the bundle")
    if place.is_dir() and os.path.ismount(place):
        raise BadData(f"{place} is a mount point, which cannot be replaced as a whole; name a folder inside it")
    if place.is_dir() and any(place.iterdir()):
        try:
            known = read_manifest(place)["files"]
        except ParedownError:
            raise BadData(f"{place} is not empty and holds no bundle; name another folder or empty it") from None
        foreign = [name for name in file_names(place) if name not in known and name != MANIFEST]
        if foreign:
            raise BadData(
                f"{place} holds a bundle, but also {foreign[0]!r}, which is not part of it and would be "
                "deleted with it; move it elsewhere or name another folder"
            )
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadData(f"the bundle cannot be written to {place}: {above} is not a folder that may be written to")


def _serving_file(target: str, precision: str, files: Mapping[str, Path]) -> str:
    """The name of the file that serves, after a look at what is given."""
    if (target, precision) not in SERVING:
        raise ParedownError(f"no file serves {precision} on {target}; choose {', '.join(map(' '.join, SERVING))}")
    file = SERVING[target, precision]
    for name in files:
        if not is_inside(name) or name in (MANIFEST, PLAN, WEIGHTS, REPORT, TOKENS) or name.startswith(f"{TOKENIZER}/"):
            raise ParedownError(f"{name!r} cannot be the name of a file that is moved into a bundle")
    needed = [file] if file != WEIGHTS else []
    if "openvino/model.xml" in (*files, *needed):
        needed += ["openvino/model.xml", "openvino/model.bin"]
    missing = [name for name in needed if name not in files]
    if missing:
        raise ParedownError(f"a bundle that serves {precision} on {target} needs the file {missing[0]}")
    return file


def _tensors(model: nn.Module, unused: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def _check_shapes(shell: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise FingerprintMismatch(
                f"the model is not what the plan leaves of the dense one: {name} has shape "
                f"{found.get(name, 'none')}, the plan gives {expected.get(name, 'none')}"
            )


def _take(source: Path, destination: Path) -> None:
    """`destination`, a second name of the same file where the file system can do that, and a copy elsewhere."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), destination)
    except FileNotFoundError:
        raise ParedownError(f"there is no file {source} to move into the bundle") from None
    except OSError:
        shutil.copyfile(source, destination)


def _settle(part: Path) -> None:
    """Everything under `part` on the disk, and readable to whom the manifest is."""
    mode = (part / MANIFEST).stat().st_mode
    for name in file_names(part):
        (part / name).chmod(mode)  # safetensors writes files that only their owner may read
        _sync(part / name)
    for directory in [path for path in part.rglob("*") if path.is_dir()] + [part]:
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _swap(part: Path, place: Path) -> None:
    """Puts `part` at `place`; what was there is deleted last, and put back if the new one cannot take its place."""
    old = old_place(place, os.getpid())
    try:
        if place.exists():
            os.rename(place, old)
        os.rename(part, place)
    except BaseException:
        if old.exists() and not place.exists():
            os.rename(old, place)
        raise
    with contextlib.suppress(OSError):  # the bundle is in its place, whatever the folder above says
        _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and tokenizers write from Rust: their errors are no OSError, and tell the number in their text only.
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
