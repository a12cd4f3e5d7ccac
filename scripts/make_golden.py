#!/usr/bin/env python
"""Writes tests/golden/<name>: a bundle of a tiny seeded model, and the outputs that it must give for ever.

Run it from a release, once per change of the format: `python scripts/make_golden.py bundle-1`, with the word `tokens`
for a bundle that drops tokens (`bundle-2 tokens`), with `zeros` for one of a sparse model (`bundle-3 zeros`), with
`network` for one of a traced network (`bundle-4 network`). A golden folder that exists is never written again: it
stands for what users have on their disks.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paredown.types import TokenPolicy, TokenStage  # noqa: E402
from tests.contracts import bundles, network_bundles  # noqa: E402  the tests are no installed package

SEED = 2  # one that gives more than one label
TARGETS = ("torch", "onnxruntime", "openvino")
ZEROS = 0.3
NETWORK = "resnet50"  # of the small ones: bottlenecks, a projected shortcut, and three branches, of which two stay
TOKENS = TokenPolicy("learned", (TokenStage(1, 0.6),), least=3, off_below=4, special_ids=(1, 2))


def main(name: str, kind: str = "") -> None:
    """Writes the folder, or ends with a sentence when it is there."""
    golden = ROOT / "tests" / "golden" / name
    if golden.exists():
        sys.exit(f"{golden} exists; a golden bundle is never changed, so give the new one another name")
    with tempfile.TemporaryDirectory() as work:
        expected = (of_network if kind == "network" else of_texts)(golden / "bundle", kind, Path(work))
    (golden / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def of_texts(folder: Path, kind: str, work: Path) -> dict[str, Any]:
    """What a classifier of texts gives, once it is written."""
    bundle = bundles.make(
        folder,
        exported=TARGETS,
        seed=SEED,
        target="onnxruntime",
        tokens=TOKENS if kind == "tokens" else None,
        zeros=ZEROS if kind == "zeros" else 0.0,
        work=work,
        hidden_size=16,
        num_attention_heads=4,
        max_position_embeddings=24,
    )
    outputs = {}
    for target in (*TARGETS, *(["sparse_cpu"] if kind == "zeros" else [])):
        outputs[target] = bundles.outputs_of(bundle, bundles.TEXTS, target).astype(float).tolist()
    labels = bundle.labels_of(np.array(outputs["torch"]))
    expected = {"texts": bundles.TEXTS, "outputs": outputs, "labels": labels, "plan_id": bundle.plan.id}
    return {**expected, "token_policy_id": TOKENS.id} if kind == "tokens" else expected


def of_network(folder: Path, kind: str, work: Path) -> dict[str, Any]:
    """What a classifier of pictures gives, once it is written."""
    bundle = network_bundles.make(folder, NETWORK, exported=True, work=work)
    pixels = network_bundles.pictures(NETWORK)
    outputs = {target: network_bundles.answers_of(bundle, pixels, target).astype(float).tolist() for target in TARGETS}
    labels = bundle.labels_of(np.array(outputs["torch"]))
    rows = [picture.tobytes().hex() for picture in pixels]
    return {"pictures": rows, "outputs": outputs, "labels": labels, "plan_id": bundle.plan.id}


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["tokens"], ["zeros"], ["network"]):
        sys.exit("usage: python scripts/make_golden.py NAME [tokens|zeros|network]")
    main(*sys.argv[1:])
