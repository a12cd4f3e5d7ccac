"""Models from a folder or the hub, and the empty shell of one: everything that is read from disk before a cut.

Only safetensors are opened, no code that comes with a model is run, and every model is fp32 and in eval mode.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from paredown.errors import UnsupportedModel
from paredown.types import canonical_json

CLASSIFICATION = "text-classification"
EMBEDDING = "text-embedding"
CAUSAL_LM = "causal-lm"
TASKS = (CLASSIFICATION, EMBEDDING, CAUSAL_LM)

# Every `model_type` that a file of anatomy/ describes, kept equal to those files by a test: this level may not import
# them, and must refuse other families before it loads their weights.
ENCODERS = ("bert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
DECODERS = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3")
FAMILIES = ENCODERS + DECODERS

# Without one of these AutoTokenizer may build a tokenizer with an empty vocabulary and say nothing.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be described. `labels` maps a classifier's label names to its output columns.

    `max_length` is the largest number of tokens that the model takes, special tokens included.
    """

    model: PreTrainedModel
    tokenizer: Any
    config: Any
    task: str
    pooling: str
    normalize: bool
    source: str
    labels: dict[str, int] | None
    max_length: int


def load_model(source: str | Path, *, task: str | None = None) -> LoadedModel:
    """The model, tokenizer and task found in a local folder or under a hub name.

    Decoders are causal language models. Of the encoders, checkpoints whose architecture ends in
    ForSequenceClassification are classifiers, all others sentence encoders, unless `task` says otherwise. A
    sentence-transformers folder brings its pooling and normalization along; an encoder without them is pooled by the
    mean. Raises `UnsupportedModel` with one sentence on what is missing or wrong, before any weights are read where the
    family is none of `FAMILIES`.
    """
    if task not in (None, *TASKS):
        raise UnsupportedModel(f"there is no task {task!r}; choose {', '.join(TASKS)}")
    root = _folder(source)
    folder, pooling, normalize, max_length = _sentence_transformer(root)
    config = _read_config(folder)
    architecture = (config.get("architectures") or [""])[0]
    classify = architecture.endswith("ForSequenceClassification") and not pooling
    decodes = config["model_type"] in DECODERS
    if task is not None and decodes != (task == CAUSAL_LM):
        raise UnsupportedModel(f"{folder} is a {config['model_type']} model, which does not do {task}")
    if decodes and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedModel(
            f"{folder} holds a {architecture or 'nameless'} model; decoders need a language model head"
        )
    task = task or (CAUSAL_LM if decodes else CLASSIFICATION if classify else EMBEDDING)
    _check_weights(folder, config, task)
    with silenced():
        labels = _labels(folder) if task == CLASSIFICATION else None
        model = _load_weights(folder, task)
        tokenizer = _load_tokenizer(folder, model)
    limits = [_positions(model), int(min(tokenizer.model_max_length, 10**9)), max_length or 10**9]
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        task=task,
        pooling="cls" if task == CLASSIFICATION else pooling or "mean",
        normalize=normalize and task == EMBEDDING,
        source=str(source),
        labels=labels,
        max_length=min(limits),
    )


def build_empty(config: Mapping[str, Any], task: str) -> PreTrainedModel:
    """The dense architecture of a config dictionary with every parameter on the meta device, in eval mode.

    Loading a state dict with `assign=True` gives a working model: buffers, such as the position ids that no
    checkpoint stores, are built for real (on a whole-model meta device they would stay meta, and on the CPU the
    weights would be allocated and initialized for nothing).
    """
    fields = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version", "dtype")}
    auto = auto_class(task)

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = nn.modules.module.register_module_parameter_registration_hook(to_meta)
    try:
        with silenced():
            plain = AutoConfig.for_model(config["model_type"], **fields)
            model: PreTrainedModel = auto.from_config(plain, dtype=torch.float32, attn_implementation="eager")
    finally:
        hook.remove()
    model.eval()
    return with_fused_attention(model) if task == CAUSAL_LM else model


def with_fused_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, calling torch's fused attention where its family has it; soft caps only eager attention knows."""
    if model._supports_sdpa and not getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("sdpa")
    return model


def fingerprint(model: PreTrainedModel, *, ignore: tuple[str, ...] = ()) -> str:
    """sha256 of the model type and the sorted names and shapes of its tensors; modules named in `ignore` left out."""
    prefixes = tuple(f"{name}." for name in ignore)
    tensors = sorted(
        (name, list(tensor.shape)) for name, tensor in model.state_dict().items() if not name.startswith(prefixes)
    )
    return hashlib.sha256(canonical_json([model.config.model_type, tensors]).encode()).hexdigest()


def auto_class(task: str) -> Any:
    """The class of transformers that opens a checkpoint for a task."""
    return {CLASSIFICATION: AutoModelForSequenceClassification, CAUSAL_LM: AutoModelForCausalLM}.get(task, AutoModel)


def task_of_class(model: nn.Module) -> str:
    """What a model's class is for."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return CAUSAL_LM
    return CLASSIFICATION if has_classifier(model) else EMBEDDING


def has_classifier(model: nn.Module) -> bool:
    """Whether the model is a sequence classifier rather than a plain encoder."""
    return type(model).__name__.endswith("ForSequenceClassification")


def unsupported_family(family: str) -> UnsupportedModel:
    """The error for a family that no anatomy file describes."""
    return UnsupportedModel(f"models of the family {family!r} are not supported; supported are {', '.join(FAMILIES)}")


# ----------------------------------------------------------------------------------------------------- where it lies


def _folder(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UnsupportedModel(f"{path} is a file; give the folder that holds config.json and model.safetensors")
    name = str(source)
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnsupportedModel(f"there is no model folder {path}")
    try:
        found = huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
            ignore_patterns=["onnx/*", "openvino/*"],
        )
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(
            f"{name!r} is neither a model folder nor a hub model that can be fetched: {reason}"
        ) from None
    return Path(found)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} cannot be read as JSON: {error}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedModel(f"{folder} holds no config.json, so it is not a transformers model folder")
    config = _read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UnsupportedModel(f"{path} names no model_type")
    if config["model_type"] not in FAMILIES:
        raise unsupported_family(config["model_type"])
    if config.get("auto_map"):
        raise UnsupportedModel(f"{path} asks for code that comes with the model (auto_map), which Paredown never runs")
    return config


def _sentence_transformer(folder: Path) -> tuple[Path, str, bool, int | None]:
    """The transformer's folder, the pooling ("" when nothing says), whether to normalize, and the longest input."""
    if not (folder / "modules.json").is_file():
        return folder, "", False, None
    transformer, pooling, normalize, max_length = folder, "", False, None
    for module in _read_json(folder / "modules.json"):
        kind, path = str(module.get("type", "")).rpartition(".")[2], folder / str(module.get("path", ""))
        if kind == "Transformer":
            transformer = path
            settings = path / "sentence_bert_config.json"
            max_length = _read_json(settings).get("max_seq_length") if settings.is_file() else None
        elif kind == "Pooling":
            pooling = _pooling(path / "config.json")
        elif kind == "Normalize":
            normalize = True
        else:
            raise UnsupportedModel(
                f"{folder / 'modules.json'} has a {kind or 'nameless'} module; "
                "supported are Transformer, Pooling and Normalize"
            )
    return transformer, pooling, normalize, max_length


def _pooling(path: Path) -> str:
    settings = _read_json(path)
    named = settings.get("pooling_mode")  # sentence-transformers 6 writes this, older ones a flag for each mode
    if named is None:
        modes = [
            key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on
        ]
        modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes] or ["mean"]
    else:
        modes = [named] if isinstance(named, str) else list(named)
    if modes not in (["mean"], ["cls"]):
        raise UnsupportedModel(f"{path} pools by {' + '.join(modes)}; supported are mean and cls")
    if not settings.get("include_prompt", True):
        raise UnsupportedModel(f"{path} leaves the prompt out of the pooling (include_prompt is false): not supported")
    return str(modes[0])


# ----------------------------------------------------------------------------------------------------- what it holds


def _check_weights(folder: Path, config: Mapping[str, Any], task: str) -> None:
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file():
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    elif not files[0].is_file():
        if (folder / "pytorch_model.bin").is_file():
            auto = auto_class(task).__name__
            convert = f"from transformers import {auto} as A; A.from_pretrained('{folder}').save_pretrained('{folder}')"
            raise UnsupportedModel(
                f"{folder} holds its weights as pytorch_model.bin only, a pickle, which Paredown never opens; "
                f'convert it: python -c "{convert}"'
            )
        raise UnsupportedModel(f"{folder} holds no model.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass  # opening reads the header and checks the file's length against it
        except (SafetensorError, OSError) as error:
            raise UnsupportedModel(f"{file} is not a readable safetensors file: {error}") from None


def _labels(folder: Path) -> dict[str, int]:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise _unloadable(folder, error) from None
    if config.problem_type in ("regression", "multi_label_classification"):
        raise UnsupportedModel(
            f"{folder} is a {config.problem_type} model; only single-label classifiers are supported"
        )
    if config.num_labels < 2:
        raise UnsupportedModel(f"{folder} has {config.num_labels} label, so it is a regression model: not supported")
    labels = {str(name): int(index) for index, name in config.id2label.items()}
    if sorted(labels.values()) != list(range(config.num_labels)):
        raise UnsupportedModel(
            f"id2label in {folder / 'config.json'} does not name each of {config.num_labels} labels once"
        )
    return labels


def _load_weights(folder: Path, task: str) -> PreTrainedModel:
    try:
        model, info = auto_class(task).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",  # the one that MPNet has too
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise _unloadable(folder, error) from None
    missing = set(info["missing_keys"])
    if task == EMBEDDING and any(name.startswith("pooler.") for name in missing):
        model.pooler = None  # it was initialized at random, and no sentence encoder reads it
        missing = {name for name in missing if not name.startswith("pooler.")}
    if missing:
        what = "a trained classification head" if any(name.startswith("classifier") for name in missing) else "weights"
        raise UnsupportedModel(f"{folder} lacks {what}: no tensor {sorted(missing)[0]!r} ({len(missing)} missing)")
    return with_fused_attention(model).eval() if task == CAUSAL_LM else model.eval()  # type: ignore[no-any-return]


def _unloadable(folder: Path, error: Exception) -> UnsupportedModel:
    return UnsupportedModel(f"{folder} cannot be loaded: {' '.join(str(error).split())}")


def _load_tokenizer(folder: Path, model: PreTrainedModel) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UnsupportedModel(f"{folder} holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise UnsupportedModel(f"the tokenizer in {folder} cannot be loaded: {error}") from None
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UnsupportedModel(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens but the model embeds only {rows}"
        )
    return tokenizer


def _positions(model: PreTrainedModel) -> int:
    """How many tokens the position table has room for: RoBERTa and MPNet count from behind the padding index."""
    padding = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
    return int(model.config.max_position_embeddings) - (0 if padding is None else int(padding) + 1)


def save_tokenizer(tokenizer: Any, folder: Path, *, max_length: int | None) -> None:
    """The tokenizer's files, with `max_length` as the length at which whoever opens them cuts a text; with None it is
    the tokenizer's own, and nothing is cut unasked: a language model's.

    A tokenizer keeps the length of its last call, and would be saved with that.
    """
    own = copy.deepcopy(tokenizer)
    own.model_max_length = own.model_max_length if max_length is None else max_length
    if own.is_fast:
        own.backend_tokenizer.no_padding()
        if max_length is None:
            own.backend_tokenizer.no_truncation()
        else:
            own.backend_tokenizer.enable_truncation(max_length)
    with silenced():
        own.save_pretrained(folder)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """transformers without its progress bars and log lines, as before afterwards: missing weights are our errors."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
