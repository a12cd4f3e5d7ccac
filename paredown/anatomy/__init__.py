"""WHAT CAN BE CUT: one file per family of models, found by the `model_type` of a model's config."""

from __future__ import annotations

from transformers import PreTrainedModel

from paredown import registry
from paredown.anatomy._traced import describe_graph
from paredown.errors import UnsupportedModel
from paredown.models import CAUSAL_LM, EMBEDDING, TASKS, fingerprint, task_of_class, unsupported_family
from paredown.types import Anatomy

__all__ = ["describe", "describe_graph", "fingerprint"]


def describe(
    model: PreTrainedModel, *, task: str | None = None, pooling: str | None = None, normalize: bool = False
) -> Anatomy:
    """What can be cut from a transformers model: heads, FFN neurons, layers, and their index tables.

    `task` is one of `paredown.models.TASKS`, by default what the model's class is for. `pooling` ("cls" or "mean", by
    default mean) and `normalize` count for embeddings only; a classifier reads its first token, a language model all
    of them ("tokens"). Raises
    `UnsupportedModel` naming the family and listing those supported.
    """
    if task not in (None, *TASKS):
        raise UnsupportedModel(f"there is no task {task!r}; choose {', '.join(TASKS)}")
    if pooling not in (None, "cls", "mean", *(["tokens"] if task == CAUSAL_LM else [])):
        raise UnsupportedModel(f"pooling {pooling!r} is not supported; choose cls or mean")
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None) or type(model).__name__
    known = {
        kind: name for name in registry.available("anatomy") for kind in registry.find("anatomy", name).MODEL_TYPES
    }
    if family not in known:
        raise unsupported_family(family)
    found = task_of_class(model)
    if found == EMBEDDING and type(model).__name__ != type(model.base_model).__name__:
        raise UnsupportedModel(f"{type(model).__name__} is neither a sequence classifier nor a plain encoder")
    if (task or found) != found:
        raise UnsupportedModel(
            f"{type(model).__name__} does {found}, not {task}; load it with paredown.models.load_model"
        )
    module = registry.find("anatomy", known[family])
    anatomy: Anatomy = module.describe(model, task=found, pooling=pooling or "mean", normalize=normalize)
    return anatomy
