"""The artefact on disk: a folder that holds everything needed to serve, reopen and re-prove a cut model.

It appears whole or not at all, records a sha256 of every file, and holds no pickle. Opening it builds the dense
architecture without weights, replays the folds and the plan on it, and loads the weights: no code per family. The
format is described in docs/bundle.md.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from paredown import __version__, registry
from paredown.anatomy import describe
from paredown.encoder import Encoder
from paredown.errors import BadData, CorruptBundle, FingerprintMismatch, ParedownError
from paredown.models import (
    FAMILIES,
    LoadedModel,
    build_empty,
    load_model,
    silenced,
    unsupported_family,
)
from paredown.surgery import cut, fold
from paredown.targets import torch as torch_target
from paredown.tasks import run_batches, tokenize
from paredown.types import Anatomy, Array, Plan, Runner, canonical_json

FORMAT = 1
MANIFEST, PLAN, WEIGHTS, TOKENIZER, REPORT = "bundle.json", "plan.json", "model.safetensors", "tokenizer", "report.json"

# The file that serves, by target and precision.
SERVING: Mapping[tuple[str, str], str] = {
    ("onnxruntime", "fp32"): "model.onnx",
    ("onnxruntime", "int8"): "model-int8.onnx",
    ("openvino", "fp32"): "openvino/model.xml",
    ("torch", "fp32"): WEIGHTS,
}
_KEYS: Mapping[str, Any] = {
    **{"paredown": str, "task": str, "family": str, "config": dict, "pooling": str, "normalize": bool},
    **{"labels": (dict, type(None)), "max_length": int, "folds": list, "plan_id": str, "tied": dict},
    **{"target": str, "precision": str, "file": str, "accepted": bool, "created": str, "files": dict},
}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # every runner takes those it knows


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; `manifest` is its bundle.json. Files are read when a method needs them, and never changed."""

    folder: Path
    manifest: Mapping[str, Any]
    plan: Plan

    def report(self) -> dict[str, Any]:
        """The evidence as written by the run that made the bundle. Raises `ParedownError` when it has none."""
        if REPORT not in self.manifest["files"]:
            raise ParedownError(f"{self.folder} was saved without a report")
        found: dict[str, Any] = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        return found

    def tokenizer(self) -> Any:
        """The transformers tokenizer of the dense model."""
        folder = self.folder / TOKENIZER
        try:
            with silenced():
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise CorruptBundle(f"the tokenizer in {folder} cannot be loaded: {error}") from None

    def model(self) -> PreTrainedModel:
        """The cut transformers model in fp32 and eval mode. Its config still tells the dense model's widths."""
        return self._open()[0]

    def encoder(self) -> Encoder:
        """The cut model as the forward pass that is exported, timed and served."""
        model, anatomy = self._open()
        return Encoder(model, anatomy.layout).eval()

    def _open(self) -> tuple[PreTrainedModel, Anatomy]:
        model, anatomy = _shell(self.manifest, self.plan)
        path = self.folder / WEIGHTS
        try:
            state: dict[str, Tensor] = load_file(path)
            # One Parameter object for every name that shares it: loading by assignment then ties them again.
            state |= {name: nn.Parameter(state[name]) for name, _ in model.named_parameters() if name in state}
            state |= {name: state[source] for name, source in self.manifest["tied"].items()}
            model.load_state_dict(state, strict=True, assign=True)
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CorruptBundle(f"{path} does not hold the weights of this bundle's model: {reason}") from None
        return model.eval(), anatomy

    def runner(self, *, target: str | None = None, precision: str | None = None, threads: int | None = None) -> Runner:
        """A runner of the file that serves, or of another one in the bundle; on all cores unless `threads` says else.

        Raises `ParedownError`, listing what there is, when the bundle has no such file, `MissingExtra` when the
        runtime is not installed. Whoever opens a runner closes it. The one of torch sets the process's threads.
        """
        target = target or self.manifest["target"]
        if precision is None:
            precision = self.manifest["precision"] if target == self.manifest["target"] else "fp32"
        file = SERVING.get((target, precision))
        if file not in self.manifest["files"]:
            have = ", ".join(" ".join(key) for key, name in SERVING.items() if name in self.manifest["files"])
            raise ParedownError(f"{self.folder} has no {precision} file for {target}; it has {have}")
        count = threads or _cores()
        if target == "torch":
            return torch_target.load_encoder(self.encoder(), threads=count)
        runner: Runner = registry.find("targets", target).load(self.folder / str(file), threads=count)
        return runner

    @cached_property
    def _serving(self) -> tuple[Any, Runner]:
        return self.tokenizer(), self.runner()

    def predict(self, texts: Sequence[str], *, batch_size: int = 64) -> Array:
        """Logits [N, C] or embeddings [N, D] of the texts, in their order, by the file that serves.

        Texts are cut at the manifest's `max_length` tokens. Tokenizer and runner are kept for the next call. Raises
        `BadData` when there is no text.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise BadData("predict takes a list of texts with at least one in it")
        tokenizer, runner = self._serving
        tokens = tokenize(tokenizer, texts, max_length=self.manifest["max_length"], input_names=_INPUTS)
        return run_batches(lambda inputs: next(iter(runner.run(inputs).values())), tokens, batch_size=batch_size)

    def labels_of(self, outputs: Array) -> list[str]:
        """The label with the largest logit for every row of `outputs` [N, C]. Raises `BadData` for an embedder."""
        labels = self.manifest["labels"]
        if not labels:
            raise BadData(f"{self.folder} is a {self.manifest['task']} model, which has no labels")
        names = {index: name for name, index in labels.items()}
        return [names[int(index)] for index in np.asarray(outputs).argmax(-1)]


# ------------------------------------------------------------------------------------------------------------ saving


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
    files: Mapping[str, Path] | None = None,
    report: Mapping[str, Any] | None = None,
) -> Bundle:
    """The bundle of the cut `model`, written at `folder`, where it appears whole or not at all.

    `loaded` is the dense model that `anatomy` describes and `plan` cuts; `files` maps names inside the bundle
    ("model.onnx", "report.html") to files that are moved in once all is written. A bundle that lies at `folder` is
    replaced after the new one is whole; until then it is untouched. Raises `FingerprintMismatch` when the model's
    tensors are not what the plan leaves, `BadData` when the folder is taken, `ParedownError` when it cannot be written.
    """
    place, moved = Path(folder).expanduser().resolve(), dict(files or {})
    check_free(place)
    config = {key: value for key, value in loaded.config.to_dict().items() if key != "_name_or_path"}
    manifest: dict[str, Any] = {
        "format": FORMAT,
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
    manifest = json.loads(canonical_json(manifest))  # as it will be read: the config's integer keys become text
    shell, own = _shell(manifest, plan)
    tensors, manifest["tied"] = _tensors(model, own.layout.unused)
    _check_shapes(shell, {**tensors, **{name: tensors[source] for name, source in manifest["tied"].items()}})

    part = place.with_name(f".{place.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, source in moved.items():
            _take(Path(source), part / name)
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        with silenced():
            loaded.tokenizer.save_pretrained(part / TOKENIZER)
        (part / PLAN).write_text(plan.to_json(), encoding="utf-8")
        if report is not None:
            (part / REPORT).write_text(_pretty(json.loads(canonical_json(report))), encoding="utf-8")
        manifest["files"] = {name: _sha256(part / name) for name in _names(part)}
        manifest["self"] = _self(manifest)
        (part / MANIFEST).write_text(_pretty(manifest), encoding="utf-8")
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
            known = _manifest(place)["files"]
        except ParedownError:
            raise BadData(f"{place} is not empty and holds no bundle; name another folder or empty it") from None
        foreign = [name for name in _names(place) if name not in known and name != MANIFEST]
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
        if not _inside(name) or name in (MANIFEST, PLAN, WEIGHTS, REPORT) or name.startswith(f"{TOKENIZER}/"):
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
    for name in _names(part):
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
    old = _aside(place, os.getpid())
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


def _aside(place: Path, who: int | str) -> Path:
    return place.with_name(f".{place.name}.old-{who}")


def _disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and tokenizers write from Rust: their errors are no OSError, and tell the number in their text only.
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


# ----------------------------------------------------------------------------------------------------------- opening


def load(folder: str | Path, *, verify: bool = True) -> Bundle:
    """The bundle at `folder`, every file of it checked against its sha256 (without `verify` only that it is there).

    Files that the manifest does not name are left alone. Raises `CorruptBundle` naming the first file that is missing
    or was changed, `ParedownError` when the folder is no bundle or was written by a release that came after this one.
    """
    place = Path(folder).expanduser().resolve()
    manifest = _manifest(place)
    for name, digest in manifest["files"].items():
        if not (place / name).is_file():
            raise CorruptBundle(f"the bundle {place} lacks {name}")
        if verify and _sha256(place / name) != digest:
            raise CorruptBundle(f"{place / name} was changed after the bundle was written: its sha256 differs")
    try:
        plan = Plan.from_json((place / PLAN).read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptBundle(f"{place / PLAN} is not a plan: {error}") from None
    if plan.id != manifest["plan_id"]:
        raise CorruptBundle(f"{place / PLAN} is not the plan of this bundle: its id differs")
    return Bundle(place, manifest, plan)


def torch_runner(path: str, *, threads: int) -> Runner:
    """A torch runner of the model in a folder: a bundle, or a transformers or sentence-transformers checkpoint.

    Timing workers load it by name ("paredown.bundle:torch_runner").
    """
    if (Path(path) / MANIFEST).is_file():
        return load(path).runner(target="torch", threads=threads)
    dense = load_model(path)
    anatomy = describe(dense.model, task=dense.task, pooling=dense.pooling, normalize=dense.normalize)
    return torch_target.load_encoder(Encoder(dense.model, anatomy.layout).eval(), threads=threads)


def _shell(manifest: Mapping[str, Any], plan: Plan) -> tuple[PreTrainedModel, Anatomy]:
    """The cut architecture without weights, and the anatomy of the dense one."""
    config = manifest["config"]
    if config.get("model_type") not in FAMILIES:
        raise unsupported_family(str(config.get("model_type")))
    task = manifest["task"]
    dense = build_empty(config, task)
    anatomy = describe(dense, task=task, pooling=manifest["pooling"], normalize=manifest["normalize"])
    folded, _ = fold(dense, anatomy)  # without weights this only drops the modules that the task never reads
    return cut(folded, anatomy, plan), anatomy


def _manifest(place: Path) -> dict[str, Any]:
    """bundle.json, its own sha256 and form checked."""
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
    if manifest.get("self") != _self(manifest) or text != _pretty(manifest):
        raise CorruptBundle(f"{path} was changed after the bundle was written: its sha256 differs")
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key, ...), kind):
            raise CorruptBundle(f"{path} has no proper {key!r}")
    for name in manifest["files"]:
        if not _inside(name):
            raise CorruptBundle(f"{path} names {name!r}, which does not lie inside the bundle")
    for name in (PLAN, WEIGHTS, manifest["file"]):
        if name not in manifest["files"]:
            raise CorruptBundle(f"{path} does not list {name}")
    return manifest


def _no_bundle(place: Path) -> str:
    if place.exists():
        return f"{place} is not a bundle: it holds no {MANIFEST}" if place.is_dir() else f"{place} is not a folder"
    aside = sorted(place.parent.glob(_aside(place, "*").name)) if place.name else []
    if aside:  # a crash came between the two renames of `_swap`
        return f"there is no bundle {place}; an interrupted save left the one before as {aside[-1]}: rename it back"
    return f"there is no bundle {place}"


def _inside(name: str) -> bool:
    """Whether a name of the manifest is a plain relative path, in the one form in which it can be written."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."
    return plain and not any(character in name for character in "\\:\0")


def _names(folder: Path) -> list[str]:
    """Every file below the folder, relative, sorted; links are files too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _self(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "self"}
    try:
        return hashlib.sha256(canonical_json(body).encode()).hexdigest()
    except ValueError:  # a damaged number became one that JSON does not have
        return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
