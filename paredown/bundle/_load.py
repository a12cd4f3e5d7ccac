"""A bundle opened: the dense architecture without weights, the folds and the plan replayed, the weights loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from paredown import registry
from paredown.anatomy import describe
from paredown.bundle._format import (
    MANIFEST,
    NETWORK_SERVING,
    PLAN,
    REPORT,
    SERVING,
    TOKENIZER,
    TOKENS,
    holds_network,
    read_manifest,
    sha256,
)
from paredown.bundle._network import open_anatomy, open_network, predict_pictures
from paredown.bundle._weights import assign, reading, stored
from paredown.cores import cores
from paredown.encoder import Encoder, admit_biases
from paredown.errors import BadData, CorruptBundle, ParedownError, UnsupportedModel
from paredown.models import CAUSAL_LM, FAMILIES, build_empty, load_model, silenced, unsupported_family
from paredown.network import Network, network
from paredown.surgery import cut, fold
from paredown.targets import graph_runner, sparse_cpu
from paredown.targets import torch as torch_target
from paredown.tasks import run_batches, tokenize
from paredown.tokens import Packed, applied
from paredown.types import Anatomy, Array, GraphAnatomy, Plan, Runner, TokenPolicy

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # every runner takes those it knows


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; `manifest` is its bundle.json. Files are read when a method needs them, and never changed.

    What a traced network does not have, such as a tokenizer, raises `ParedownError` when it is asked for.
    """

    folder: Path
    manifest: Mapping[str, Any]
    plan: Plan

    def report(self) -> dict[str, Any]:
        """The evidence as written by the run that made the bundle. Raises `ParedownError` when it has none."""
        if REPORT not in self.manifest["files"]:
            raise ParedownError(f"{self.folder} was saved without a report")
        found: dict[str, Any] = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        return found

    @property
    def is_network(self) -> bool:
        """Whether it holds a traced network, which takes pictures, and no transformer."""
        return holds_network(self.manifest)

    def _only_of_texts(self, what: str) -> None:
        if self.is_network:
            raise ParedownError(f"{self.folder} holds a network that takes pictures, which has no {what}")

    def tokenizer(self) -> Any:
        """The transformers tokenizer of the dense model."""
        self._only_of_texts("tokenizer")
        folder = self.folder / TOKENIZER
        try:
            with silenced():
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise CorruptBundle(f"the tokenizer in {folder} cannot be loaded: {error}") from None

    def model(self) -> PreTrainedModel | fx.GraphModule:
        """The cut model in fp32 and eval mode, of transformers, whose config still tells the dense model's widths, or a
        traced graph, as the dense one was.
        """
        return open_network(self.folder, self.manifest, self.plan) if self.is_network else self._open()[0]

    def anatomy(self) -> Anatomy | GraphAnatomy:
        """What could be cut from the dense model: the whole of which the plan keeps a part."""
        return open_anatomy(self.folder, self.plan) if self.is_network else build_shell(self.manifest, self.plan)[1]

    def network(self) -> Network | Packed:
        """The cut model as the forward pass that is exported, timed and served, tokens dropped by its policy."""
        self._only_of_texts("forward pass but its model()")
        model, anatomy = self._open()
        whole, policy = network(model.eval(), anatomy.layout), self.token_policy
        if policy is None:
            return whole
        learnt = self.token_tensors()
        try:
            return applied(cast(Encoder, whole), policy, learnt)
        except UnsupportedModel as error:
            raise CorruptBundle(f"the token policy of {self.folder} does not fit its model: {error}") from None

    def _encoder(self) -> Encoder:
        """The model as the sparse engine takes it. Raises `ParedownError` for what that does not run."""
        whole = self.network()
        if not isinstance(whole, Encoder):
            raise ParedownError(f"{self.folder} is not for sparse_cpu, which runs text encoders that keep their tokens")
        return whole

    @property
    def token_policy(self) -> TokenPolicy | None:
        """By which the model drops tokens while it runs, if it does. Raises `CorruptBundle` where it makes no sense."""
        self._only_of_texts("token policy")
        if self.manifest.get("tokens") is None:
            return None
        try:
            return TokenPolicy.from_json(json.dumps(self.manifest["tokens"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptBundle(f"{self.folder / MANIFEST} holds no proper token policy: {error}") from None

    def token_tensors(self) -> dict[str, Tensor]:
        """What the token policy has learnt; nothing where there is no such file."""
        self._only_of_texts("token policy")
        if TOKENS not in self.manifest["files"]:
            return {}
        path = self.folder / TOKENS
        try:
            found: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CorruptBundle(f"{path} does not hold what the token policy has learnt: {reason}") from None
        return found

    def _open(self) -> tuple[PreTrainedModel, Anatomy]:
        model, anatomy = build_shell(self.manifest, self.plan)
        with reading(self.folder):
            state = stored(self.folder, self.manifest)
            admit_biases(model, state)
            assign(model, state, self.manifest["tied"])
            if self.manifest.get("generation"):
                model.generation_config = GenerationConfig.from_dict(dict(self.manifest["generation"]))
        return model.eval(), anatomy

    def runner(self, *, target: str | None = None, precision: str | None = None, threads: int | None = None) -> Runner:
        """A runner of the file that serves, or of another one in the bundle; on all cores unless `threads` says else.
        With `precision` "bf16", torch and OpenVINO compute in bfloat16, from the same file.

        Raises `ParedownError`, listing what there is, when the bundle has no such file, `MissingExtra` when the
        runtime is not installed. Whoever opens a runner closes it. The one of torch sets the process's threads.
        """
        target = target or self.manifest["target"]
        if precision is None:
            precision = self.manifest["precision"] if target == self.manifest["target"] else "fp32"
        serving = NETWORK_SERVING if self.is_network else SERVING
        file = serving.get((target, precision))
        if file not in self.manifest["files"]:
            have = ", ".join(" ".join(key) for key, name in serving.items() if name in self.manifest["files"])
            raise ParedownError(f"{self.folder} has no {precision} file for {target}; it has {have}")
        count = threads or cores()
        if target == "torch" and self.is_network:
            return graph_runner(cast(fx.GraphModule, self.model()), threads=count)
        if target == "torch":
            return torch_target.load_encoder(self.network(), threads=count, precision=precision)
        if target == "sparse_cpu":
            return sparse_cpu.load_encoder(self._encoder(), threads=count)
        lower = {"precision": precision} if precision == "bf16" else {}
        runner: Runner = registry.find("targets", target).load(self.folder / str(file), threads=count, **lower)
        return runner

    @cached_property
    def _serving(self) -> Runner:
        return self.runner()

    @cached_property
    def _tokenizer(self) -> Any:
        return self.tokenizer()

    def predict(self, inputs: Sequence[str] | Array, *, batch_size: int = 64) -> Array:
        """Logits [N, C] or embeddings [N, D] by the file that serves, in the order of the texts or, for a network, of
        uint8 pictures [N, H, W, 3].

        Texts are cut at the manifest's `max_length` tokens; pictures have its `size` and are normalized as it says.
        Tokenizer and runner are kept for the next call. Raises `BadData` for anything else, and for nothing.
        """
        if self.is_network:
            return predict_pictures(self._serving, inputs, self.manifest, batch_size)
        if self.manifest["task"] == CAUSAL_LM:
            raise BadData(f"{self.folder} is a language model: use its model().generate and its tokenizer()")
        texts = [] if inputs is None or isinstance(inputs, str) else list(inputs)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise BadData("predict takes a list of texts with at least one in it")
        tokens = tokenize(self._tokenizer, texts, max_length=self.manifest["max_length"], input_names=_INPUTS)
        runner = self._serving
        return run_batches(lambda arrays: next(iter(runner.run(arrays).values())), tokens, batch_size=batch_size)

    def labels_of(self, outputs: Array) -> list[str]:
        """The label with the largest logit for every row of `outputs` [N, C]; of a network without names its index.

        Raises `BadData` for an embedder, and for outputs of another shape.
        """
        labels = self.manifest["labels"]
        if not labels and not self.is_network:
            raise BadData(f"{self.folder} is a {self.manifest['task']} model, which has no labels")
        if np.ndim(outputs) != 2:
            raise BadData(f"labels are those of outputs [N, C]; these are {list(np.shape(outputs))}")
        names = {index: name for name, index in (labels or {}).items()}
        return [names.get(index, str(index)) for index in np.asarray(outputs).argmax(-1).tolist()]


def load(folder: str | Path, *, verify: bool = True) -> Bundle:
    """The bundle at `folder`, every file of it checked against its sha256 (without `verify` only that it is there).

    Files that the manifest does not name are left alone. Raises `CorruptBundle` naming the first file that is missing
    or was changed, `ParedownError` when the folder is no bundle or was written by a release that came after this one.
    """
    place = Path(folder).expanduser().resolve()
    manifest = read_manifest(place)
    for name, digest in manifest["files"].items():
        if not (place / name).is_file():
            raise CorruptBundle(f"the bundle {place} lacks {name}")
        if verify and sha256(place / name) != digest:
            raise CorruptBundle(f"{place / name} was changed after the bundle was written: its sha256 differs")
    try:
        plan = Plan.from_json((place / PLAN).read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptBundle(f"{place / PLAN} is not a plan: {error}") from None
    if plan.id != manifest["plan_id"]:
        raise CorruptBundle(f"{place / PLAN} is not the plan of this bundle: its id differs")
    return Bundle(place, manifest, plan)


def torch_runner(path: str, *, threads: int, target: str = "torch") -> Runner:
    """A torch runner of the model in a folder: a bundle, or a transformers or sentence-transformers checkpoint; of a
    bundle also one for another `target` that reads its weights.

    Timing workers load it by name ("paredown.bundle:torch_runner").
    """
    if (Path(path) / MANIFEST).is_file():
        return load(path).runner(target=target, threads=threads)
    dense = load_model(path)
    anatomy = describe(dense.model, task=dense.task, pooling=dense.pooling, normalize=dense.normalize)
    return torch_target.load_encoder(network(dense.model.eval(), anatomy.layout), threads=threads)


def build_shell(manifest: Mapping[str, Any], plan: Plan) -> tuple[PreTrainedModel, Anatomy]:
    """The cut architecture without weights, and the anatomy of the dense one."""
    config = manifest["config"]
    if config.get("model_type") not in FAMILIES:
        raise unsupported_family(str(config.get("model_type")))
    task = manifest["task"]
    dense = build_empty(config, task)
    anatomy = describe(dense, task=task, pooling=manifest["pooling"], normalize=manifest["normalize"])
    folded, _ = fold(dense, anatomy)  # without weights this only drops the modules that the task never reads
    return cut(folded, anatomy, plan), anatomy
