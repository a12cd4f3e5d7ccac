"""A checkpoint that stock transformers opens with nothing of ours installed, for plans that its config can express."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from paredown.encoder import blocks_of, inputs_of, linear_of
from paredown.errors import BadData, ParityFailure, UnsupportedModel
from paredown.models import save_tokenizer, silenced
from paredown.types import Anatomy, Array, Limits, Plan

LIMITS = Limits(uniform=True, allowed=("neuron", "layer"))
TOLERANCE = 1e-5  # fp32, relative to the largest output: the same kernels on the same machine

_REOPEN = """
import sys, numpy, torch, transformers
folder, auto, inputs, outputs = sys.argv[1:]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
model = getattr(transformers, auto).from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
assert "paredown" not in sys.modules
with torch.no_grad():
    out = model(**{name: torch.from_numpy(array) for name, array in numpy.load(inputs).items()})
    if auto == "AutoModelForCausalLM":
        ids = torch.from_numpy(numpy.load(inputs)["input_ids"])[:1]
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        how["pad_token_id"] = 0
        fast, slow = (model.generate(ids, use_cache=cached, **how) for cached in (True, False))
        assert torch.equal(fast, slow), "generation with the cache is another one than without"
numpy.save(outputs, out[0].numpy())
"""


def expressible(anatomy: Anatomy, plan: Plan) -> str | None:
    """Why the stock config cannot express the plan, or None when it can.

    A config has one width for all layers, above 0. Encoders, and GPT-2, derive the head size from the number of heads,
    so every head of a kept layer must stay; other decoders state it, and every kept layer must keep as many heads.
    """
    if anatomy.layout.pooling == "tokens":
        return _decoder_expressible(anatomy, plan)
    layers = plan.keep["layers"]
    widths = set()
    for group in anatomy.groups:
        if group.layer not in layers:
            continue
        kept = len(plan.keep[group.name])
        if group.kind == "head" and (kept < group.units or kept < anatomy.layout.num_heads):
            return f"{group.name} keeps {kept} of {anatomy.layout.num_heads} heads; the stock config needs all of them"
        if group.kind == "neuron":
            widths.add(kept)
    if len(widths) > 1:
        return f"the layers keep {min(widths)} to {max(widths)} neurons; the stock config has one number for all layers"
    if widths == {0}:
        return "no layer keeps any neuron; the stock config needs at least one"
    return None


def _decoder_expressible(anatomy: Anatomy, plan: Plan) -> str | None:
    layers = plan.keep["layers"]
    for kind in ("heads", "queries", "neurons"):
        groups = [group for group in anatomy.groups if group.name.endswith(f".{kind}") and group.layer in layers]
        kept = {len(plan.keep[group.name]) for group in groups}
        if len(kept) > 1:
            return f"the layers keep {min(kept)} to {max(kept)} {kind}; the stock config has one number for all layers"
        if kept == {0}:
            return f"no layer keeps any {kind}; the stock config needs at least one"
        if kind == "heads" and "fused" in anatomy.layout.layer_names and kept != {groups[0].units}:
            return "its heads are cut, and the stock config derives the size of a head from their number"
    return None


def export(
    model: PreTrainedModel, tokenizer: Any, folder: str | Path, *, anatomy: Anatomy, plan: Plan, max_length: int
) -> Path:
    """The folder of a stock checkpoint of the cut model: config, safetensors, tokenizer.

    For sentence encoders also the pooling, in the form that sentence-transformers reads. `max_length` is where texts
    are cut. It is reopened by stock transformers in a process of its own and must compute the same before the folder
    appears. Raises
    `UnsupportedModel` when the plan is not `expressible`, `BadData` when the folder is taken, `ParityFailure` when
    the reopened model differs by more than `TOLERANCE`.
    """
    reason = expressible(anatomy, plan)
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False) and len(plan.keep["layers"]) < len(
        anatomy.identity()["layers"]
    ):
        reason = "its attention is scaled by the number of the layer, and layers are gone"
    if reason is not None:
        raise UnsupportedModel(f"this plan needs Paredown to be opened: {reason}")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadData(f"{target} exists and is not an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        built = Path(work) / "model"
        _save(model, tokenizer, built, anatomy, max_length)
        _verify(model, built, Path(work), anatomy)
        if target.is_dir():
            target.rmdir()
        shutil.move(built, target)
    return target


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path, anatomy: Anatomy, max_length: int) -> None:
    layout = anatomy.layout
    blocks = blocks_of(model, layout)
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers = len(blocks)
    width = inputs_of(linear_of(blocks[0], layout, "down"))
    names = ("n_inner", "hidden_dim", "intermediate_size")
    setattr(config, next(name for name in names if name in config.to_dict()), width)
    if layout.pooling == "tokens" and "fused" not in layout.layer_names:
        config.head_dim = layout.head_dim
        config.num_attention_heads = inputs_of(linear_of(blocks[0], layout, "output")) // layout.head_dim
        config.num_key_value_heads = linear_of(blocks[0], layout, "key").weight.shape[0] // layout.head_dim
    twin = copy.copy(model)  # the same weights under another config, so that the caller's config stays as it is
    twin.config = config
    with silenced():
        twin.save_pretrained(folder)
    generates = layout.pooling == "tokens"
    save_tokenizer(tokenizer, folder, max_length=None if generates else max_length)
    if not layout.head and not generates:  # a sentence encoder
        about = {"max_seq_length": max_length, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
        _save_pooling(folder, anatomy, config.hidden_size)


def _save_pooling(folder: Path, anatomy: Anatomy, width: int) -> None:
    kinds = ["Transformer", "Pooling"] + (["Normalize"] if anatomy.layout.normalize else [])
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    for module in modules[1:]:
        (folder / str(module["path"])).mkdir()
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": anatomy.layout.pooling == "cls",
        "pooling_mode_mean_tokens": anatomy.layout.pooling == "mean",
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2), encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")


def _verify(model: PreTrainedModel, folder: Path, work: Path, anatomy: Anatomy) -> None:
    inputs = _probe(model, anatomy)
    np.savez(work / "inputs.npz", **inputs)  # type: ignore[arg-type]
    auto = "AutoModelForSequenceClassification" if anatomy.layout.head else "AutoModel"
    auto = "AutoModelForCausalLM" if anatomy.layout.pooling == "tokens" else auto
    command = [sys.executable, "-I", "-W", "ignore", "-c", _REOPEN, str(folder), auto]
    done = subprocess.run(
        [*command, str(work / "inputs.npz"), str(work / "outputs.npy")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ParityFailure(f"stock transformers cannot reopen the checkpoint: {last}")
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})[0].numpy()
    real = (
        inputs["attention_mask"].astype(bool) if expected.ndim == 3 else slice(None)
    )  # padding rows count for nothing
    difference = float(np.abs(np.load(work / "outputs.npy") - expected)[real].max())
    if difference > TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ParityFailure(f"stock transformers computes something else: outputs differ by {difference:.2g}")


def _probe(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Array]:
    """Four seeded texts of ragged lengths, as token ids [4, 12]."""
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    padding = model.config.pad_token_id or 0
    random = np.random.default_rng(0)
    mask = (np.arange(12) < np.array([[12], [9], [5], [2]])).astype(np.int64)
    ids = np.where(mask == 1, random.integers(min(padding + 1, rows - 1), rows, mask.shape), padding)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"token_type_ids": np.zeros_like(mask)} if anatomy.layout.token_types else {})
