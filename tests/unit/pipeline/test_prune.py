"""The main job from end to end on a tiny model: what it hands over, refuses, and takes up again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import paredown
from paredown.pipeline import Progress, Settings, _prepare, _run
from paredown.pipeline._latency import Stopwatch
from paredown.pipeline._prepare import prepare
from paredown.pipeline._students import Workshop
from paredown.planning import LatencyTable
from paredown.tasks import pad, tokenize
from paredown.validation.quality import least_bound
from tests.contracts.bundles import INPUTS
from tests.contracts.families import save, tiny, tiny_tokenizer
from tests.unit.pipeline.conftest import Desk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")
KEYS = {
    *("accepted", "target", "speedup", "speedup_against", "latency_ms_p50", "texts_per_second", "quality_metric"),
    *("quality_dense", "quality_pruned", "drop", "parameters_dense", "parameters_pruned", "minutes", "bundle"),
}


@pytest.fixture(scope="session")
def loose(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> paredown.bundle.Bundle:
    """A run whose gate everything passes."""
    out = tmp_path_factory.mktemp("loose") / "slim"
    return paredown.prune(desk.model, data=desk.train, eval=desk.test, out=out, max_drop=0.9, minutes=0.05, threads=1)


def test_the_bundle_holds_the_facts_and_answers(loose: paredown.bundle.Bundle, desk: Desk) -> None:
    facts = loose.report()
    assert set(facts) >= KEYS
    assert facts["accepted"] is True and loose.manifest["accepted"] is True
    assert facts["speedup"]["low"] <= facts["speedup"]["value"] <= facts["speedup"]["high"]
    assert facts["drop"]["low"] <= facts["drop"]["value"] <= facts["drop"]["high"]
    assert facts["quality_dense"] == 1.0
    kinds = {row["kind"] for row in facts["candidates"]}
    assert {"dense", "dense-int8", "folded", "pruned", "pruned-int8", "layer-drop", "tfidf"} <= kinds
    assert sum(row["chosen"] for row in facts["candidates"]) == 1
    assert all(row["quality"] is not None for row in facts["candidates"])
    assert (loose.folder / "report.html").read_text(encoding="utf-8").startswith("<!")
    reopened = paredown.load(loose.folder)
    logits = reopened.predict(["a b c", "c b a b"])
    assert logits.shape == (2, 3) and np.isfinite(logits).all()
    assert not list(loose.folder.parent.glob(".*.work"))


def test_the_fastest_that_passed_is_chosen(loose: paredown.bundle.Bundle) -> None:
    rows = loose.report()["candidates"]
    chosen = next(row for row in rows if row["chosen"])
    able = [r for r in rows if r["kind"] not in ("dense", "tfidf") and r["target"] == "onnxruntime"]
    assert chosen["texts_per_second"] >= 0.9 * max(row["texts_per_second"] for row in able)
    assert all(row["passed"] is None for row in able if row is not chosen)


def test_splits_are_disjoint_and_counted(loose: paredown.bundle.Bundle) -> None:
    data = loose.report()["data"]
    assert data["guardrail"] + data["test"] == pytest.approx(700, abs=40)
    assert 0.55 < data["guardrail"] / (data["guardrail"] + data["test"]) < 0.65


def test_a_failed_gate_marks_nothing_accepted_and_spares_what_was(
    loose: paredown.bundle.Bundle, desk: Desk, tmp_path: Path
) -> None:
    out = shutil.copytree(loose.folder, tmp_path / "slim")
    with pytest.raises(paredown.GateFailed, match="closest is .*The gate cannot pass") as caught:
        paredown.prune(desk.model, data=desk.train, eval=desk.test, out=out, max_drop=0.0, minutes=0, threads=1)
    facts = caught.value.result
    assert isinstance(facts, dict) and facts["accepted"] is False and facts["peak_memory_mib"] > 100
    assert f"--out {out}" in facts["command"].split(" --threads")[1]
    assert caught.value.exit_code == 3
    assert paredown.load(out).manifest == loose.manifest
    assert paredown.load(tmp_path / "slim-rejected").manifest["accepted"] is False


def test_what_is_truncated_and_a_gate_that_cannot_pass_are_said_before_the_work(desk: Desk, tmp_path: Path) -> None:
    about = {"data": str(desk.train), "eval": str(desk.test), "out": str(tmp_path / "slim")}
    found = prepare(Settings(str(desk.model), **about, max_length=4, max_drop=0.001))
    assert all(tokens.lengths.max() == 4 for tokens in (found.calibration, found.guardrail, found.test))
    cut = sum(tokens.truncated for tokens in (found.calibration, found.guardrail, found.test))
    assert cut and f"{cut} texts are longer than 4 tokens and were truncated." in found.notes
    (said,) = (note for note in found.notes if note.startswith("The gate cannot pass"))
    needed = int(said.split(" texts, and ")[1].split()[0])
    assert least_bound(needed, 0.9) <= 0.001 < least_bound(needed - 1, 0.9)
    enough = prepare(Settings(str(desk.model), **about, max_drop=0.01))
    assert not any("cannot pass" in note for note in enough.notes)


def test_a_model_that_no_onnx_file_holds_is_refused(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_prepare, "MOST_BYTES", 1000)
    with pytest.raises(paredown.UnsupportedModel, match="GiB of fp32 weights"):
        prepare(Settings(str(desk.model), data=str(desk.train), eval=None, out=str(tmp_path / "slim")))


@pytest.mark.parametrize(("dial", "value"), [("speedup", 1e6), ("latency_ms", 1e-6)])
def test_an_impossible_speed_names_the_closest_before_any_training(
    desk: Desk, tmp_path: Path, dial: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workshop, "distilled", lambda *_: pytest.fail("it was trained in vain"))
    with pytest.raises(paredown.InfeasibleBudget, match="closest that can be reached is") as caught:
        paredown.prune(
            desk.model, data=desk.train, eval=desk.test, out=tmp_path / "slim", minutes=1, threads=1, **{dial: value}
        )
    assert min(1, value) < caught.value.closest < max(value, 1e3)
    assert not (tmp_path / "slim").exists()


def test_an_impossible_speed_that_the_table_promises_is_told_before_any_training(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Stopwatch.table

    def promising(watch: Stopwatch, progress: Progress) -> LatencyTable:
        table = measured(watch, progress)
        nothing = {kind: {**curve, 0: 0.0} for kind, curve in table.inner.items()}
        return LatencyTable(0.0, nothing, nothing)

    monkeypatch.setattr(Stopwatch, "table", promising)
    monkeypatch.setattr(Workshop, "distilled", lambda *_: pytest.fail("it was trained in vain"))
    with pytest.raises(paredown.InfeasibleBudget, match="closest that can be reached is"):
        paredown.prune(
            desk.model, data=desk.train, eval=desk.test, out=tmp_path / "slim", minutes=1, threads=1, speedup=1e6
        )


def test_a_latency_that_is_asked_for_is_met(desk: Desk, tmp_path: Path) -> None:
    made = paredown.prune(
        desk.model, data=desk.train, eval=desk.test, out=tmp_path / "slim", latency_ms=1e3, minutes=0, threads=1
    )
    facts = made.report()
    assert facts["accepted"] and facts["objective"] == {"dial": "latency_ms", "value": 1e3, "max_drop": None}
    assert facts["latency_ms_p50"]["pruned"] <= 1e3
    assert facts["candidate"] == "dense, exact folds" and facts["quality_pruned"] == facts["quality_dense"]


def test_uniform_gives_what_stock_transformers_opens(desk: Desk, tmp_path: Path) -> None:
    paredown.prune(
        desk.model,
        data=desk.train,
        eval=desk.test,
        out=tmp_path / "slim",
        max_drop=0.9,
        minutes=0,
        uniform=True,
        threads=1,
    )
    code = (
        "import sys; sys.modules['paredown'] = None\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        "print(sum(p.numel() for p in A.from_pretrained(sys.argv[1]).parameters()))"
    )
    folder = tmp_path / "slim" / "huggingface"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == paredown.load(tmp_path / "slim").report()["parameters_pruned"]


def test_a_killed_run_goes_on_where_it_was(desk: Desk, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    command = [sys.executable, "-m", "paredown", "prune", str(desk.model), "--data", str(desk.train)]
    command += [
        "--eval",
        str(desk.test),
        "--out",
        str(out),
        "--max-drop",
        "90%",
        "--minutes",
        "0",
        "--threads",
        "1",
        "--json",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    work = tmp_path / ".slim.work"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 240
    while not (work / "scores.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    table = work / "latency-offline.json"
    assert table.exists() and not out.exists()
    assert json.loads(table.read_text())["dense"] > 0
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "Going on from where" in done.stderr
    assert "Timing widths" not in done.stderr  # what was measured is read, not measured again
    assert json.loads(done.stdout.splitlines()[-1])["accepted"] is True
    assert not work.exists() and out.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"speedup": 2.0, "latency_ms": 3.0}, "not for both"),
        ({"target": "tpu"}, "no target"),
        ({"max_drop": 1.5}, "max_drop is a share"),
        ({"minutes": -1.0}, "minutes"),
        ({"confidence": 0.2}, "confidence"),
        ({"speedup": 0.5}, "speedup is a factor"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(paredown.ParedownError, match=sentence):
        Settings(**{"model": "m", "data": "d", "eval": None, "out": "o", **changes})  # type: ignore[arg-type]


def test_bad_data_is_told_before_any_work(desk: Desk, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,category\nhello there,unheard of\nmore,bill\n")
    with pytest.raises(paredown.BadData, match="unheard of"):
        paredown.prune(desk.model, data=desk.train, eval=bad, out=tmp_path / "slim", minutes=0)
    assert not list(tmp_path.glob(".slim*"))


def test_a_sentence_encoder_without_labels(desk: Desk, tmp_path: Path) -> None:
    model = save(tiny("mpnet", "text-embedding"), tmp_path / "model")
    tiny_tokenizer("mpnet").save_pretrained(model)
    out = tmp_path / "slim"
    made = paredown.prune(model, data=desk.train, eval=desk.test, out=out, max_drop=0.9, minutes=0.02, threads=1)
    facts = made.report()
    assert facts["quality_metric"] == "cosine" and facts["quality_dense"] == pytest.approx(1.0)
    assert {"cosine", "neighbour_overlap_at_10"} <= set(facts["metrics_pruned"])
    assert not any(row["kind"] == "tfidf" for row in facts["candidates"])
    assert facts["parity"] < 1e-4


@pytest.mark.parametrize("target", ["openvino"])  # torch takes minutes: every timing process imports transformers
def test_other_targets(desk: Desk, tmp_path: Path, target: str) -> None:
    out = tmp_path / "slim"
    made = paredown.prune(
        desk.model, data=desk.train, eval=desk.test, out=out, max_drop=0.9, minutes=0, target=target, threads=1
    )
    assert made.manifest["target"] == target and made.manifest["precision"] == "fp32"
    rows = {row["name"]: row for row in made.report()["candidates"]}
    assert rows["dense int8"]["chosen"] is False  # it runs on ONNX Runtime, which was not asked for
    assert made.predict(["a b c"]).shape == (1, 3)


def test_a_token_policy_goes_through_the_gate_into_the_bundle(
    loose: paredown.bundle.Bundle, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was asked for, on every model; texts as short as these are tried with none otherwise."""
    assert not [row for row in loose.report()["candidates"] if row["kind"].startswith("tokens")]
    policy = paredown.TokenPolicy("learned", (paredown.TokenStage(1, 0.6),), off_below=4, special_ids=(2, 3))
    (tmp_path / "policy.json").write_text(policy.to_json())
    (tmp_path / "policy.safetensors").write_bytes(b"")
    monkeypatch.setattr(
        _run, "chosen", lambda judged, settings: next(one for one in judged if one.candidate.kind == "tokens")
    )
    about = {"data": desk.train, "eval": desk.test, "max_drop": 0.9, "minutes": 0, "threads": 1}
    with pytest.raises(paredown.ParedownError, match="cannot be read"):
        paredown.prune(desk.model, out=tmp_path / "slim", tokens=tmp_path, **about)
    save_file({"gate.1": torch.ones(loose.model().config.hidden_size)}, tmp_path / "policy.safetensors")
    bundle = paredown.prune(desk.model, out=tmp_path / "slim", tokens=tmp_path, **about)
    rows = bundle.report()["candidates"]
    tried = [row["name"] for row in rows if row["kind"] == "tokens"]
    assert len(tried) >= 2 and all(name.endswith("tokens learned, 60% after 1") for name in tried)
    assert len([row for row in rows if row["kind"] == "tokens-int8"]) == len(tried)
    assert paredown.load(bundle.folder).token_policy == policy and bundle.manifest["format"] == 2
    assert f"--tokens {tmp_path}" in bundle.report()["command"]
    served, eager = (bundle.runner(target=target, threads=1) for target in ("onnxruntime", "torch"))
    tokens = tokenize(
        bundle.tokenizer(), ["card new pay w1 w2 w3 w4 the bill", "w1"], max_length=16, input_names=INPUTS
    )
    batch = pad(tokens.ids, pad_id=tokens.pad_id, input_names=INPUTS)
    np.testing.assert_allclose(served.run(batch)["logits"], eager.run(batch)["logits"], atol=1e-4)
    found = paredown.validate(bundle.folder, eval=desk.test, threads=1, max_drop=0.9)
    assert found["quality_pruned"] == pytest.approx(bundle.report()["quality_pruned"], abs=0.1)
