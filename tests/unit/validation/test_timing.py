"""Worker processes that only sleep: who is asked what and when, what happens when one dies. No timing is asserted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paredown.errors import ParedownError
from paredown.validation import timing
from paredown.validation.timing import Alternative, Timing, latency_ratio, measure, ratio

HELPER = """
import json, os, sys, time

class Runner:
    def __init__(self, path, threads, fail_at=-1, noisy=False):
        self.log, self.fail_at, self.noisy, self.runs = open(path, "a"), fail_at, noisy, 0
        self.write({"loaded": threads, "pid": os.getpid(), "torch": "torch" in sys.modules,
                    "omp": os.environ["OMP_NUM_THREADS"], "wait": os.environ["OMP_WAIT_POLICY"]})

    def write(self, entry):
        self.log.write(json.dumps({"at": time.monotonic_ns(), **entry}) + "\\n"); self.log.flush()

    def run(self, inputs):
        if self.noisy:
            print("a library prints"); os.write(1, b"and so does its C code")
        if self.runs == self.fail_at:
            raise RuntimeError("the kernel\\nbroke")
        self.runs += 1
        self.write({"ids": inputs["input_ids"].tolist(), "dtype": str(inputs["input_ids"].dtype)})
        return {"logits": inputs["input_ids"]}

    def close(self):
        self.write({"closed": True})

def load(path, *, threads, fail_at=-1, noisy=False):
    return Runner(path, threads, fail_at, noisy)
"""


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "timing_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def alternative(folder: Path, name: str, **options: Any) -> Alternative:
    return Alternative(name, "timing_helper:load", str(folder / f"{name}.log"), options)


def log_of(folder: Path, name: str) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (folder / f"{name}.log").read_text().splitlines()]


def batch(*rows: int) -> Mapping[str, np.ndarray]:
    return {"input_ids": np.array([[row] for row in rows]), "attention_mask": np.ones((len(rows), 1), np.int64)}


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_rounds_interleave_and_everybody_gets_the_same_work(helper: Path) -> None:
    seen = []
    timings = measure(
        [alternative(helper, "a"), alternative(helper, "b", noisy=True)],
        [batch(1, 2), batch(3)],
        singles=[batch(8), batch(9)],
        rounds=3,
        threads=1,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert list(timings) == ["a", "b"]
    logs = {name: log_of(helper, name) for name in timings}
    for name, log in logs.items():
        assert log[0] | {"at": 0, "pid": 0} == {
            "at": 0,
            "loaded": 1,
            "pid": 0,
            "torch": False,
            "omp": "1",
            "wait": "PASSIVE",
        }
        assert log[-1]["closed"]
        assert [entry["ids"] for entry in log[1:-1]] == [[[1], [2]], [[3]], [[8]], [[9]]] * 4  # a round warms up
        assert {entry["dtype"] for entry in log[1:-1]} == {"int64"}
        assert timings[name].offline_seconds.shape == (3,)
        assert timings[name].single_ms.shape == (3, 2)
        assert (timings[name].offline_seconds > 0).all()
        assert (timings[name].single_ms > 0).all()
        assert timings[name].texts == 3
        assert not alive(log[0]["pid"])
    assert logs["a"][0]["pid"] != logs["b"][0]["pid"]
    turns = sorted((entry["at"], name) for name, log in logs.items() for entry in log[1:-1])
    # Per round: two batches in a block of their own each, then both singles, so nobody runs 5 times on end.
    order = "".join(name for _, name in turns)
    assert "a" * 7 not in order
    assert "b" * 7 not in order
    assert order.count("ab") + order.count("ba") >= 3 * 3


def test_no_more_processes_are_alive_than_may_be_together(helper: Path) -> None:
    seen = []
    timings = measure(
        [alternative(helper, name) for name in "abcd"],
        [batch(1, 2)],
        singles=[batch(3)],
        rounds=3,
        threads=1,
        together=2,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == [(done, 9) for done in range(1, 10)]
    assert list(timings) == ["a", "b", "c", "d"]
    assert all(timing.offline_seconds.shape == (3,) for timing in timings.values())
    assert all(timing.single_ms.shape == (3, 1) for timing in timings.values())
    starts = [entry for entry in log_of(helper, "a") if "loaded" in entry]
    assert len({entry["pid"] for entry in starts}) == 3  # the first is timed with each of the others
    lives = sorted((log_of(helper, name)[0]["at"], log_of(helper, name)[-1]["at"]) for name in "bcd")
    assert all(end < begin for (_, end), (begin, _) in pairwise(lives))


def test_times_of_a_later_group_are_scaled_by_what_the_first_alternative_took_there() -> None:
    here = Timing("a", np.array([1.0, 2.0, 9.0]), np.array([[1.0, 3.0], [2.0, 2.0], [9.0, 9.0]]), 4)
    there = Timing("a", np.array([2.0, 8.0]), np.array([[4.0, 4.0], [1.0, 1.0]]), 4)
    other = Timing("b", np.array([1.0, 2.0]), np.array([[2.0, 6.0], [1.0, 3.0]]), 4)
    scaled = timing._scaled(other, there, here, 2)
    np.testing.assert_allclose(scaled.offline_seconds, [0.5, 0.5])
    np.testing.assert_allclose(scaled.single_ms, [[1.0, 3.0], [2.0, 6.0]])


def test_seconds_ends_early_but_not_before_five_rounds(helper: Path) -> None:
    timings = measure([alternative(helper, "a")], [batch(1)], rounds=50, threads=1, seconds=0.0)
    assert timings["a"].offline_seconds.shape == (5,)
    assert timings["a"].single_ms.shape == (5, 0)
    assert np.isnan(timings["a"].latency_ms_p50)


def test_a_worker_that_dies_is_named_with_its_last_words_and_nobody_is_left(helper: Path) -> None:
    with pytest.raises(ParedownError, match=r"'b' ended: RuntimeError: the kernel broke"):
        measure([alternative(helper, "a"), alternative(helper, "b", fail_at=2)], [batch(1)], threads=1)
    for name in "ab":
        assert not alive(log_of(helper, name)[0]["pid"])


def test_a_loader_that_fails_is_named(helper: Path) -> None:
    with pytest.raises(ParedownError, match=r"'a' ended: ModuleNotFoundError: No module named 'nowhere'"):
        measure([Alternative("a", "nowhere:load", "x")], [batch(1)], threads=1)


def test_workers_end_when_the_user_stops(helper: Path) -> None:
    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([alternative(helper, "a")], [batch(1)], threads=1, progress=stop)
    assert log_of(helper, "a")[-1]["closed"]
    assert not alive(log_of(helper, "a")[0]["pid"])


def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 0.1)
    process = subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    timing._stop(process)
    assert process.returncode == -9


def test_nothing_to_time_is_said() -> None:
    with pytest.raises(ParedownError, match="names of their own"):
        measure([Alternative("a", "x:y", ""), Alternative("a", "x:y", "")], [batch(1)])
    with pytest.raises(ParedownError, match="at least one batch"):
        measure([Alternative("a", "x:y", "")], [])


def test_a_ratio_pairs_rounds() -> None:
    drift = np.array([1.0, 2.0, 4.0, 8.0, 16.0])  # a machine that gets slower and slower
    single = np.stack([drift, 3 * drift, 2 * drift], 1)
    a, b = Timing("a", 3 * drift, 6 * single, 30), Timing("b", drift, 4 * single, 30)
    faster = ratio(a, b)
    assert (faster.value, faster.low, faster.high) == (3.0, 3.0, 3.0)
    assert latency_ratio(a, b).value == 1.5
    assert ratio(b, a).value == pytest.approx(1 / 3)
    assert a.texts_per_second == 30 / 12
    assert a.latency_ms_p50 == pytest.approx(np.median(6 * single))
    assert a.latency_ms_p90 > a.latency_ms_p50


def test_an_interval_holds_its_value_and_grows_with_confidence() -> None:
    random = np.random.default_rng(1)
    a, b = (Timing(name, random.uniform(1, 2, 9), np.zeros((9, 0)), 1) for name in "ab")
    wide, narrow = ratio(a, b, confidence=0.99), ratio(a, b, confidence=0.5)
    assert wide.low <= narrow.low <= narrow.value <= narrow.high <= wide.high
    assert wide.low < wide.high
    assert ratio(a, b, seed=3) == ratio(a, b, seed=3)
    with pytest.raises(ParedownError, match="without single texts"):
        latency_ratio(a, b)
    with pytest.raises(ParedownError, match="cannot be paired"):
        ratio(a, Timing("b", np.ones(4), np.zeros((4, 0)), 1))


def test_timing_and_its_workers_import_no_torch() -> None:
    code = (
        "import sys, paredown.validation.timing, paredown.validation._worker, paredown.targets.onnxruntime,"
        " paredown.targets.openvino; print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
