"""Fair timing: every alternative in a process of its own, one awake at a time, interleaved, with intervals.

Legend: R rounds, S single texts.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from paredown.cores import cores
from paredown.errors import ParedownError
from paredown.types import Array, Interval
from paredown.validation._worker import receive, send

BLOCKS = 4  # parts of a round that alternate: short enough that a slow spell of the machine hits everybody alike
RESAMPLES = 2000  # of the bootstrap; the bounds then move by less than a tenth of their distance
FEWEST_ROUNDS = 5  # least and most of so many hold the median in 94 of 100 cases: fewer cannot give a 95 % interval
PATIENCE = 5.0  # seconds that a worker gets to end by itself


@dataclass(frozen=True)
class Alternative:
    """One thing to time. `loader` is "package.module:function", called as function(path, threads=..., **options)."""

    name: str
    loader: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """What one alternative took: `offline_seconds` [R] for all batches of a round, `single_ms` [R, S] for each text."""

    name: str
    offline_seconds: Array
    single_ms: Array
    texts: int

    @property
    def texts_per_second(self) -> float:
        """Offline throughput, median over rounds."""
        return float(self.texts / np.median(self.offline_seconds))

    @property
    def latency_ms_p50(self) -> float:
        """SingleStream median; nan when no single texts were timed."""
        return self._percentile(50)

    @property
    def latency_ms_p90(self) -> float:
        """SingleStream 90th percentile; nan when no single texts were timed."""
        return self._percentile(90)

    def _percentile(self, percent: float) -> float:
        return float(np.percentile(self.single_ms, percent)) if self.single_ms.size else float("nan")


def measure(
    alternatives: Sequence[Alternative],
    batches: Sequence[Mapping[str, Array]],
    *,
    singles: Sequence[Mapping[str, Array]] = (),
    rounds: int = 7,
    threads: int | None = None,
    seconds: float | None = None,
    together: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """A timing of each alternative by name: all `batches` (Offline) and then all `singles` (SingleStream) per round.

    A first round warms up and is discarded. In every round the alternatives take turns part by part, in an order
    drawn anew, and each sleeps while another runs. `threads` is by default the number of cores of this process.
    `seconds` ends the run early, after five rounds at least; `progress(done, of)` is called after every round.

    No more than `together` (2 or more) processes are alive at once. Where there are more alternatives than that, the
    first one is timed with every group of the others, and a group's times are scaled by what it took there, round by
    round: list what ratios will be taken against first.
    Raises ParedownError, with the worker's own last words, when one cannot load or run; no worker is left behind.
    """
    names = [alternative.name for alternative in alternatives]
    if len(set(names)) != len(names) or not names:
        raise ParedownError(f"timing needs alternatives with names of their own; got {names}")
    if not batches or rounds < 1:
        raise ParedownError("timing needs at least one batch and one round")
    first, *others = alternatives
    size = max(1, (together or len(names)) - 1)
    groups = [[first, *others[i : i + size]] for i in range(0, max(1, len(others)), size)]
    found: dict[str, Timing] = {}
    for number, group in enumerate(groups):
        taken = _side_by_side(
            group,
            batches,
            singles,
            rounds=rounds,
            threads=threads or cores(),
            seconds=seconds / len(groups) if seconds is not None else None,
            seed=seed + number,
            progress=_part(progress, number * rounds, rounds * len(groups)),
        )
        anchor = found.get(first.name, taken[first.name])
        both = min(len(anchor.offline_seconds), len(taken[first.name].offline_seconds))
        found = {name: _first_rounds(timing, both) for name, timing in found.items()}
        new = {name: timing for name, timing in taken.items() if name not in found}
        found |= {name: _scaled(timing, taken[first.name], anchor, both) for name, timing in new.items()}
    return found


def _part(progress: Callable[[int, int], None] | None, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total) if progress is not None else None


def _first_rounds(timing: Timing, rounds: int) -> Timing:
    return Timing(timing.name, timing.offline_seconds[:rounds], timing.single_ms[:rounds], timing.texts)


def _scaled(timing: Timing, there: Timing, here: Timing, rounds: int) -> Timing:
    """The first `rounds` of a timing taken beside `there`, as if beside `here`, which is the same thing elsewhere."""
    taken, there, here = (_first_rounds(one, rounds) for one in (timing, there, here))
    offline = here.offline_seconds / there.offline_seconds
    single = _middle(here) / _middle(there) if there.single_ms.size else np.ones((rounds, 1))
    return Timing(timing.name, taken.offline_seconds * offline, taken.single_ms * single, timing.texts)


def _middle(timing: Timing) -> Array:
    """[R, 1]: the median of each round's single texts."""
    return np.median(timing.single_ms, 1, keepdims=True)


def _side_by_side(
    alternatives: Sequence[Alternative],
    batches: Sequence[Mapping[str, Array]],
    singles: Sequence[Mapping[str, Array]],
    *,
    rounds: int,
    threads: int,
    seconds: float | None,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, Timing]:
    names = [alternative.name for alternative in alternatives]
    work = [*batches, *singles]
    edges = np.linspace(0, len(batches), min(BLOCKS, len(batches)) + 1).astype(int)
    spans = [*zip(edges[:-1], edges[1:], strict=True)] + ([(len(batches), len(work))] if singles else [])
    times = {name: np.zeros((rounds, len(work))) for name in names}
    random = np.random.default_rng(seed)
    done, started = 0, 0.0
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_started(alternative, threads)) for alternative in alternatives]
        for worker, alternative in zip(workers, alternatives, strict=True):
            header = {"loader": alternative.loader, "path": alternative.path, "threads": threads}
            worker.tell({**header, "options": dict(alternative.options)}, work)
        for worker in workers:  # they load side by side
            worker.answer()
        for turn in range(-1, rounds):  # turn -1 warms up
            for start, stop in spans:
                for i in random.permutation(len(workers)):
                    took = workers[i].run(int(start), int(stop))
                    if turn >= 0:
                        times[names[i]][turn, start:stop] = took
            if turn < 0:
                started = time.perf_counter()
                continue
            done = turn + 1
            progress(done)
            if seconds is not None and done >= FEWEST_ROUNDS and time.perf_counter() - started >= seconds:
                break
    texts = sum(len(next(iter(batch.values()))) for batch in batches)
    cut = len(batches)
    return {
        name: Timing(name, taken[:done, :cut].sum(1), taken[:done, cut:] * 1e3, texts) for name, taken in times.items()
    }


def ratio(a: Timing, b: Timing, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """How many times as fast as `a` is `b` (Offline): median over rounds of a/b, with a bootstrap interval.

    Both must come from one call of `measure`: round r of one is paired with round r of the other.
    """
    return _median_ratio(a.offline_seconds, b.offline_seconds, confidence, seed)


def latency_ratio(a: Timing, b: Timing, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The same for SingleStream: each round gives the ratio of its two median latencies. ParedownError if not timed."""
    if not a.single_ms.size or not b.single_ms.size:
        raise ParedownError(f"{a.name} and {b.name} were timed without single texts, so there is no latency to compare")
    return _median_ratio(np.median(a.single_ms, 1), np.median(b.single_ms, 1), confidence, seed)


def _median_ratio(a: Array, b: Array, confidence: float, seed: int) -> Interval:
    if a.shape != b.shape:
        raise ParedownError(f"timings of {len(a)} and {len(b)} rounds cannot be paired; measure both in one call")
    ratios = a / b
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(ratios[drawn], 1), [tail, 1 - tail])
    return Interval(float(np.median(ratios)), float(low), float(high))


class _Worker:
    def __init__(self, name: str, process: subprocess.Popen[bytes], log: IO[bytes]):
        self.name, self.process, self.log = name, process, log

    def tell(self, header: Mapping[str, Any], batches: Sequence[Mapping[str, Array]] = ()) -> None:
        assert self.process.stdin is not None
        with self._mourned():
            send(self.process.stdin, header, batches)  # type: ignore[arg-type]

    def answer(self) -> list[dict[str, Array]]:
        assert self.process.stdout is not None
        with self._mourned():
            return receive(self.process.stdout)[1]  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _mourned(self) -> Iterator[None]:
        """Says whose process it was, and its last words, when it ended."""
        try:
            yield
        except (EOFError, BrokenPipeError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
            raise ParedownError(f"the process that times {self.name!r} ended: {self._last_words()}") from error

    def run(self, start: int, stop: int) -> Array:
        self.tell({"start_at": start, "stop_at": stop})
        return self.answer()[0]["seconds"]

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.process.poll()}, without a word"


@contextlib.contextmanager
def _started(alternative: Alternative, threads: int) -> Iterator[_Worker]:
    """A worker that has nothing loaded yet; it is gone when the block ends."""
    environment = dict(os.environ)
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # GNU's and Intel's OpenMP: idle threads sleep instead of spinning
        "KMP_BLOCKTIME": "0",
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "paredown.validation._worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
        worker = _Worker(alternative.name, process, log)
        try:
            yield worker
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the worker: closing its input tells it to stop; what does not stop is killed."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        process.stdout.close()
