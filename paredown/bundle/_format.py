"""The form of a bundle: the names of its files, and the manifest, read and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from paredown import __version__
from paredown.errors import CorruptBundle, ParedownError
from paredown.types import canonical_json

FORMAT = 4  # the newest that is read; what is written has the lowest that tells it, so that earlier releases read it
PLAIN, DROPPING, SPARSE, NETWORK = 1, 2, 3, 4  # as it is, with a token policy, without its zeros, no transformer
MANIFEST, PLAN, WEIGHTS, TOKENIZER, REPORT = "bundle.json", "plan.json", "model.safetensors", "tokenizer", "report.json"
TOKENS = "tokens.safetensors"  # what the token policy has learnt
GRAPH = "graph.json"  # the operators of a network, before the cut
FAMILY = "graph"  # of networks, which have a graph and no config

# The file that serves, by target and precision.
SERVING: Mapping[tuple[str, str], str] = {
    ("onnxruntime", "fp32"): "model.onnx",
    ("onnxruntime", "int8"): "model-int8.onnx",
    ("openvino", "fp32"): "openvino/model.xml",
    ("openvino", "bf16"): "openvino/model.xml",
    ("torch", "fp32"): WEIGHTS,
    ("torch", "bf16"): WEIGHTS,
    ("sparse_cpu", "fp32"): WEIGHTS,
}
# Of a network: no engine of ours takes one, and torch runs it in fp32.
NETWORK_SERVING = {key: SERVING[key] for key in SERVING if key not in (("torch", "bf16"), ("sparse_cpu", "fp32"))}

_KEYS: Mapping[str, Any] = {
    **{"paredown": str, "task": str, "family": str, "labels": (dict, type(None)), "plan_id": str, "tied": dict},
    **{"target": str, "precision": str, "file": str, "accepted": bool, "created": str, "files": dict},
}
_TEXT_KEYS: Mapping[str, Any] = {"config": dict, "pooling": str, "normalize": bool, "max_length": int, "folds": list}
_NETWORK_KEYS: Mapping[str, Any] = {"source": str, "mean": list, "std": list, "size": list, "buffers": list}


def read_manifest(place: Path) -> dict[str, Any]:
    """bundle.json of the folder `place`, its own sha256 and form checked; raises as `load` does."""
    path = place / MANIFEST
    if not path.is_file():
        raise ParedownError(_no_bundle(place))
    try:
        text = path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptBundle(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise CorruptBundle(f"{path} states no format, so it is damaged or not written by Paredown")
    if manifest["format"] > FORMAT:
        raise ParedownError(
            f"{path} has format {manifest['format']} and Paredown {__version__} reads formats up to {FORMAT}: "
            'upgrade with pip install -U "paredown"'
        )
    # The text is compared too: a changed blank changes no value, but is a changed byte all the same.
    if manifest.get("self") != digest_of(manifest) or text != pretty(manifest):
        raise CorruptBundle(f"{path} was changed after the bundle was written: its sha256 differs")
    own = _NETWORK_KEYS if holds_network(manifest) else _TEXT_KEYS
    wrong = [key for key, kind in {**_KEYS, **own}.items() if not isinstance(manifest.get(key, ...), kind)]
    wrong = wrong or (_wrong_of_network(manifest) if holds_network(manifest) else [])
    if wrong:
        raise CorruptBundle(f"{path} has no proper {wrong[0]!r}")
    for name in manifest["files"]:
        if not is_inside(name):
            raise CorruptBundle(f"{path} names {name!r}, which does not lie inside the bundle")
    if not isinstance(manifest.get("tokens"), dict | type(None)):
        raise CorruptBundle(f"{path} has no proper 'tokens'")
    if not _are_shapes(manifest.get("compressed", {})):
        raise CorruptBundle(f"{path} has no proper 'compressed'")
    for name in (PLAN, WEIGHTS, manifest["file"], *([GRAPH] if holds_network(manifest) else [])):
        if name not in manifest["files"]:
            raise CorruptBundle(f"{path} does not list {name}")
    return manifest


def holds_network(manifest: Mapping[str, Any]) -> bool:
    """Whether a bundle holds a traced network, which takes pictures, and no transformer."""
    return manifest.get("family") == FAMILY


def _wrong_of_network(manifest: Mapping[str, Any]) -> list[str]:
    """The keys of a network's manifest that have the right type and hold the wrong things."""
    mean, std, size = (manifest[key] for key in ("mean", "std", "size"))
    labels = manifest["labels"] or {}
    proper = {
        "mean": len(mean) == 3 and all(type(one) in (int, float) for one in mean),
        "std": len(std) == 3 and all(type(one) in (int, float) and one > 0 for one in std),
        "size": len(size) == 2 and all(type(one) is int and one > 0 for one in size),
        "buffers": all(isinstance(name, str) for name in manifest["buffers"]),
        "labels": all(type(index) is int for index in labels.values()),
    }
    return [key for key, fine in proper.items() if not fine]


def _are_shapes(found: object) -> bool:
    return isinstance(found, dict) and all(
        isinstance(shape, list) and shape and all(type(size) is int and size > 0 for size in shape)
        for shape in found.values()
    )


def _no_bundle(place: Path) -> str:
    if place.exists():
        return f"{place} is not a bundle: it holds no {MANIFEST}" if place.is_dir() else f"{place} is not a folder"
    aside = sorted(place.parent.glob(old_place(place, "*").name)) if place.name else []
    if aside:  # a crash came between the two renames of `_save._swap`
        return f"there is no bundle {place}; an interrupted save left the one before as {aside[-1]}: rename it back"
    return f"there is no bundle {place}"


def old_place(place: Path, who: int | str) -> Path:
    """Where the bundle at `place` lies while the process `who` puts a new one there."""
    return place.with_name(f".{place.name}.old-{who}")


def is_inside(name: str) -> bool:
    """Whether a name of the manifest is a plain relative path, in the one form in which it can be written."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."
    return plain and not any(character in name for character in "\\:\0")


def file_names(folder: Path) -> list[str]:
    """Every file below the folder, relative, sorted; links are files too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The sha256 that a manifest states of itself, over all of it but that; empty when JSON cannot write it."""
    body = {key: value for key, value in manifest.items() if key != "self"}
    try:
        return hashlib.sha256(canonical_json(body).encode()).hexdigest()
    except ValueError:  # a damaged number became one that JSON does not have
        return ""


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pretty(value: object) -> str:
    """The text of a JSON file in a bundle."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
