"""What a bundle holds, gathered and checked: of a transformer, and of a traced network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, fx
from transformers import PreTrainedModel

from paredown import __version__
from paredown.bundle._compressed import compressed
from paredown.bundle._format import (
    DROPPING,
    GRAPH,
    MANIFEST,
    NETWORK,
    NETWORK_SERVING,
    PLAIN,
    PLAN,
    REPORT,
    SERVING,
    SPARSE,
    TOKENIZER,
    TOKENS,
    WEIGHTS,
    file_names,
    is_inside,
    read_manifest,
)
from paredown.bundle._load import Bundle, build_shell
from paredown.bundle._network import about_network, shell_of
from paredown.bundle._weights import check_shapes, tensors_of, with_tied
from paredown.bundle._write import write
from paredown.errors import BadData, FingerprintMismatch, ParedownError
from paredown.graph import fingerprint, to_json
from paredown.models import CAUSAL_LM, LoadedModel, save_tokenizer
from paredown.networks import LoadedNetwork
from paredown.tasks import image_classification
from paredown.types import Anatomy, GraphAnatomy, Plan, TokenPolicy, canonical_json


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
    place, moved = _place(folder), dict(files or {})
    check_free(place)
    config = {key: value for key, value in loaded.config.to_dict().items() if key != "_name_or_path"}
    manifest: dict[str, Any] = {
        "format": PLAIN if tokens is None else DROPPING,
        "task": loaded.task,
        "family": anatomy.family,
        "config": config,
        "pooling": anatomy.layout.pooling,
        "normalize": anatomy.layout.normalize,
        "labels": loaded.labels,
        "max_length": loaded.max_length,
        "folds": list(folds),
        **_common(plan, target, precision, _serving_file(target, precision, moved, SERVING), accepted),
    }
    if tokens is not None:
        manifest["tokens"] = json.loads(tokens.to_json())
    if loaded.task == CAUSAL_LM:
        manifest["generation"] = cast(Any, loaded.model).generation_config.to_diff_dict()
    manifest = json.loads(canonical_json(manifest))  # as it will be read: the config's integer keys become text
    shell, described = build_shell(manifest, plan)
    tensors, manifest["tied"] = tensors_of(model, described.layout.unused)
    check_shapes(shell, with_tied(tensors, manifest["tied"]))
    tensors, shapes = compressed(tensors)
    if shapes:
        manifest |= {"format": SPARSE, "compressed": shapes}

    def own(part: Path) -> None:
        if token_tensors:
            save_file({name: tensor.contiguous() for name, tensor in token_tensors.items()}, part / TOKENS)
        longest = None if loaded.task == CAUSAL_LM else loaded.max_length
        save_tokenizer(loaded.tokenizer, part / TOKENIZER, max_length=longest)

    return write(place, manifest, plan, tensors, own=own, moved=moved, report=report)


def save_network(
    folder: str | Path,
    *,
    model: fx.GraphModule,
    dense: fx.GraphModule,
    anatomy: GraphAnatomy,
    plan: Plan,
    loaded: LoadedNetwork,
    target: str,
    precision: str = "fp32",
    accepted: bool,
    files: Mapping[str, Path] | None = None,
    report: Mapping[str, Any] | None = None,
) -> Bundle:
    """The bundle of the cut network `model`, written at `folder` as `save` does.

    `dense` is the traced network that `anatomy` describes and `plan` cuts, and `loaded` where it came from: its mean
    and std must be known, its labels are told, and the size of its pictures is the one it was traced with. Raises
    `FingerprintMismatch` when the model is not what the plan leaves, `UnsupportedModel` for one that takes no pictures,
    `BadData` and `ParedownError` as `save` does.
    """
    place, moved = _place(folder), dict(files or {})
    check_free(place)
    manifest: dict[str, Any] = {
        "format": NETWORK,
        "task": image_classification.NAME,
        "family": anatomy.family,
        **about_network(loaded, dense),
        **_common(plan, target, precision, _serving_file(target, precision, moved, NETWORK_SERVING), accepted),
    }
    graph = canonical_json(to_json(dense))
    tensors, manifest["tied"] = tensors_of(model)
    manifest = json.loads(canonical_json(manifest))  # as it will be read: a list and not a tuple
    whole = with_tied(tensors, manifest["tied"])
    shell = shell_of(json.loads(graph), plan, whole, manifest["buffers"])
    check_shapes(shell, whole)
    if fingerprint(shell) != fingerprint(model) or plan.fingerprint != anatomy.fingerprint:
        raise FingerprintMismatch("the network's operators, or its anatomy, are not those of what the plan cuts")
    tensors, shapes = compressed(tensors)
    if shapes:
        manifest["compressed"] = shapes

    def own(part: Path) -> None:
        (part / GRAPH).write_text(graph, encoding="utf-8")

    return write(place, manifest, plan, tensors, own=own, moved=moved, report=report)


def _place(folder: str | Path) -> Path:
    return Path(folder).expanduser().resolve()


def _common(plan: Plan, target: str, precision: str, file: str, accepted: bool) -> dict[str, Any]:
    """What the manifest of every bundle tells."""
    return {
        "paredown": __version__,
        "plan_id": plan.id,
        "target": target,
        "precision": precision,
        "file": file,
        "accepted": accepted,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_free(folder: str | Path) -> None:
    """Nothing, when a bundle may be written at `folder`: it is not there yet, or is empty, or holds a bundle.

    Raises `BadData` with the reason when it may not, so that hours of work do not end in a refusal.
    """
    place = _place(folder)
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


def _serving_file(
    target: str, precision: str, files: Mapping[str, Path], serving: Mapping[tuple[str, str], str]
) -> str:
    """The name of the file that serves, after a look at what is given."""
    if (target, precision) not in serving:
        raise ParedownError(f"no file serves {precision} on {target}; choose {', '.join(map(' '.join, serving))}")
    file, own = serving[target, precision], (MANIFEST, PLAN, WEIGHTS, REPORT, TOKENS, GRAPH)
    for name in files:
        if not is_inside(name) or name in own or name.startswith(f"{TOKENIZER}/"):
            raise ParedownError(f"{name!r} cannot be the name of a file that is moved into a bundle")
    needed = [file] if file != WEIGHTS else []
    if "openvino/model.xml" in (*files, *needed):
        needed += ["openvino/model.xml", "openvino/model.bin"]
    missing = [name for name in needed if name not in files]
    if missing:
        raise ParedownError(f"a bundle that serves {precision} on {target} needs the file {missing[0]}")
    return file
