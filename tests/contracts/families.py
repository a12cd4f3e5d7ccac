"""Tiny seeded models of every family, with ragged inputs and tokenizers that fit them: for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from paredown.anatomy import describe

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2")
TASKS = ("text-classification", "text-embedding")
CAUSAL_LM = "causal-lm"
CASES = tuple((family, task) for family in FAMILIES for task in TASKS) + tuple((one, CAUSAL_LM) for one in DECODERS)
VOCABULARY = 61
LABELS = ("bill", "card", "loan")
COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "mpnet")  # their padding index is 1 and positions start behind it

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 24,
    "max_position_embeddings": 40,
}
_OWN: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 20, "pad_token_id": 0},
    "roberta": {"intermediate_size": 20, "pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"intermediate_size": 20, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"hidden_dim": 20, "pad_token_id": 0},
    "electra": {"intermediate_size": 20, "pad_token_id": 0, "embedding_size": 10},
    "mpnet": {"intermediate_size": 20, "pad_token_id": 1, "relative_attention_num_buckets": 32},
}
_GROUPED: dict[str, Any] = {"intermediate_size": 20, "pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 6}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_OWN |= {
    "llama": {**_GROUPED, "tie_word_embeddings": True},
    "mistral": {**_GROUPED, "sliding_window": 5},
    "qwen2": {**_GROUPED, "layer_types": _WINDOWS, "sliding_window": 5, "use_sliding_window": True},
    "qwen3": {**_GROUPED, "tie_word_embeddings": True},
    "gemma2": {**_GROUPED, "layer_types": _WINDOWS, "sliding_window": 11, "query_pre_attn_scalar": 6},
    "gemma3_text": {**_GROUPED, "layer_types": _WINDOWS, "sliding_window": 5, "query_pre_attn_scalar": 6},
    "gpt2": {"n_inner": 20, "pad_token_id": 0},
}
_DISTILBERT = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}


def config_of(family: str, **changes: Any) -> Any:
    """A config of the family: 3 layers, 4 heads of 6, 20 neurons, width 24, 61 tokens, unless `changes` says else.

    Decoders have 2 key-value heads, but for GPT-2, and a window of 5 tokens in some layers where the family has one.
    """
    fields = {**_COMMON, **_OWN[family], **changes}
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][: fields["num_hidden_layers"]]
    if family in FAMILIES:
        fields.setdefault("id2label", dict(enumerate(LABELS)))
        fields["label2id"] = {name: index for index, name in fields["id2label"].items()}
    if family == "distilbert":
        fields = {_DISTILBERT.get(name, name): value for name, value in fields.items()}
    return AutoConfig.for_model(family, **fields)


def tiny(family: str, task: str = "text-classification", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A seeded model in fp32 and eval mode. Every parameter is drawn anew: stock initialization leaves biases zero."""
    auto = AutoModelForSequenceClassification if task == "text-classification" else AutoModel
    auto = AutoModelForCausalLM if family in DECODERS else auto
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config_of(family, **changes), dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name):
                    parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def batch(model: PreTrainedModel, *, lengths: tuple[int, ...] = (11, 7, 3, 1), seed: int = 0) -> dict[str, Tensor]:
    """Ragged `input_ids` and `attention_mask` [B, T], and `token_type_ids` where the family has it."""
    random = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=random)
    inputs = {"input_ids": torch.where(mask == 1, ids, model.config.pad_token_id), "attention_mask": mask}
    if model.config.model_type in ("bert", "electra"):
        inputs["token_type_ids"] = torch.zeros_like(mask)
    return inputs


def stock(
    model: PreTrainedModel, inputs: dict[str, Tensor], *, pooling: str = "mean", normalize: bool = False
) -> Tensor:
    """What the stock forward pass of transformers gives: logits [B, C], pooled embeddings [B, D], or logits of all real
    tokens [N, V].
    """
    with torch.no_grad():
        out = model(**inputs)
    if model.config.model_type in DECODERS:
        logits: Tensor = out.logits[inputs["attention_mask"].bool()]
        return logits
    if "logits" in out:
        return out.logits
    x = out.last_hidden_state
    weight = inputs["attention_mask"][:, :, None].to(x.dtype)
    pooled = x[:, 0] if pooling == "cls" else (x * weight).sum(1) / weight.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled


def widths(model: PreTrainedModel, *kinds: str) -> list[tuple[int, ...]]:
    """How many units of each kind every layer has: heads and neurons, unless `kinds` says else."""
    anatomy = describe(model)
    units = {group.name: group.units for group in anatomy.groups}
    layers = range(anatomy.group("layers").units)
    return [tuple(units.get(f"layer.{i}.{kind}", 0) for kind in kinds or ("heads", "neurons")) for i in layers]


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer of 61 tokens: letters, digits and some words; padding has the family's id."""
    special = ("<pad>", "<s>") if family not in COUNTS_FROM_PADDING else ("<s>", "<pad>")
    words = [*special, "</s>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz", *"0123456789"]
    words += ["my", "card", "is", "lost", "pay", "bill", "the", "loan", "help", "want", "to", "new"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if family in ("bert", "electra") else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=38,
        model_input_names=names,
    )


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model with its tokenizer as a stock checkpoint."""
    model.save_pretrained(folder)
    tiny_tokenizer(model.config.model_type).save_pretrained(folder)
    return folder
