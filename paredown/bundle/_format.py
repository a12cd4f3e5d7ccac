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

FORMAT = 3  # what is written is 1 where no tokens are dropped, 2 where no weights are zero: earlier releases read it
MANIFEST, PLAN, WEIGHTS, TOKENIZER, REPORT = "bundle.json", "plan.json", "model.safetensors", "tokenizer", "report.json"
TOKENS = "tokens.safetensors"  # what the token policy has learnt

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
_KEYS: Mapping[str, Any] = {
    **{"paredown": str, "task": str, "family": str, "config": dict, "pooling": str, "normalize": bool},
    **{"labels": (dict, type(None)), "max_length": int, "folds": list, "plan_id": str, "tied": dict},
    **{"target": str, "precision": str, "file": str, "accepted": bool, "created": str, "files": dict},
}


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
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key, ...), kind):
            raise CorruptBundle(f"{path} has no proper {key!r}")
    for name in manifest["files"]:
        if not is_inside(name):
            raise CorruptBundle(f"{path} names {name!r}, which does not lie inside the bundle")
    if not isinstance(manifest.get("tokens"), dict | type(None)):
        raise CorruptBundle(f"{path} has no proper 'tokens'")
    if not _are_shapes(manifest.get("compressed", {})):
        raise CorruptBundle(f"{path} has no proper 'compressed'")
    for name in (PLAN, WEIGHTS, manifest["file"]):
        if name not in manifest["files"]:
            raise CorruptBundle(f"{path} does not list {name}")
    return manifest


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
