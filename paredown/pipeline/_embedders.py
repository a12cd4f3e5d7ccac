"""Whatever turns texts into vectors, opened alike: a sentence encoder, a classifier without its head, a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from paredown import bundle as bundles
from paredown.encoder import Encoder
from paredown.errors import ParedownError, UnsupportedModel
from paredown.models import CAUSAL_LM, CLASSIFICATION, EMBEDDING, load_model
from paredown.network import Network
from paredown.pipeline._prepare import describe_loaded
from paredown.surgery import parameters
from paredown.targets.torch import load_encoder
from paredown.tasks import Tokens, run_batches, tokenize
from paredown.tokens import Packed
from paredown.types import Array, Runner

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # every runner takes those it knows
MEAN = "mean"  # over a text's tokens: how `load_model` pools an encoder that says nothing of it


@dataclass(frozen=True)
class Embedder:
    """A model with the runner that embeds by it. `dense` is what a stock export is made from, None of a bundle."""

    source: str
    runner: Runner
    tokenizer: Any
    max_length: int
    target: str
    precision: str
    pooling: str
    parameters: int
    classifier: bool
    dense: Encoder | None

    @property
    def is_bundle(self) -> bool:
        return self.dense is None

    def tokens(self, texts: Sequence[str], *, max_length: int | None = None) -> Tokens:
        length = min(self.max_length, max_length or self.max_length)
        return tokenize(self.tokenizer, texts, max_length=length, input_names=INPUTS)

    def embed(self, tokens: Tokens, advance: Callable[[int], object]) -> Array:
        """Embeddings [N, D]; `advance` is told how many texts each batch held. Raises ParedownError if one is nan."""

        def run(arrays: Any) -> Array:
            found = next(iter(self.runner.run(arrays).values()))
            advance(len(found))
            return found

        found = run_batches(run, tokens)
        if not np.isfinite(found).all():
            raise ParedownError(
                f"{self.source} gives embeddings that are not finite numbers, so nothing can be learnt."
            )
        return found


def open_embedder(path: str, *, threads: int) -> Embedder:
    """The model or bundle at `path`, ready to embed.

    A bundle that embeds runs as it serves, any other model on torch. Of a classifier, dense or pruned, the embedding is
    the mean over a text's tokens: on intents that it was not trained for, it beats the first token, which its head
    reads, by 5 points and more. Sets torch's number of threads. Raises UnsupportedModel for language models.
    """
    if (Path(path) / bundles.MANIFEST).is_file():
        return _of_bundle(path, threads)
    loaded = load_model(path)
    if loaded.task == CAUSAL_LM:
        raise _generates(path)
    classifier = loaded.task == CLASSIFICATION
    if classifier:  # its encoder alone
        loaded = load_model(path, task=EMBEDDING)
    whole = Encoder(loaded.model, describe_loaded(loaded, loaded.model).layout)
    return Embedder(
        source=path,
        runner=load_encoder(whole, threads=threads),
        tokenizer=loaded.tokenizer,
        max_length=loaded.max_length,
        target="torch",
        precision="fp32",
        pooling=loaded.pooling,
        parameters=parameters(loaded.model),
        classifier=classifier,
        dense=whole,
    )


def _of_bundle(path: str, threads: int) -> Embedder:
    opened = bundles.load(Path(path))
    about = opened.manifest
    if about["task"] == CAUSAL_LM:
        raise _generates(path)
    classifier = about["task"] == CLASSIFICATION
    whole = opened.network()
    runner = load_encoder(_without_head(whole), threads=threads) if classifier else opened.runner(threads=threads)
    return Embedder(
        source=path,
        runner=runner,
        tokenizer=opened.tokenizer(),
        max_length=about["max_length"],
        target="torch" if classifier else about["target"],
        precision="fp32" if classifier else about["precision"],
        pooling=MEAN if classifier else about["pooling"],
        parameters=parameters(whole.model),
        classifier=classifier,
        dense=None,
    )


def _without_head(whole: Network | Packed) -> Network | Packed:
    """The network of a classifier, just opened, made to give the mean over tokens, as an encoder alone does."""
    inner = cast(Encoder, getattr(whole, "encoder", whole))  # one that skips tokens has the encoder inside
    inner.layout = replace(inner.layout, head=(), pooling=MEAN)
    inner.output_name = "embeddings"
    return whole


def _generates(path: str) -> UnsupportedModel:
    return UnsupportedModel(f"{path} is a language model; sentence embeddings come from a text encoder")
