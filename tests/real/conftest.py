"""What tests on real data share."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

Banking77 = Callable[[int, int], tuple[Path, Path]]


@pytest.fixture(scope="session")
def banking77(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Banking77:
    """Two files, to learn from and to judge on, with every so-manieth of BANKING77's texts: a whole run fits into a
    test run then.
    """

    def some(learnt: int, judged: int) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("banking77")
        for name, every in (("train", learnt), ("test", judged)):
            with (assets / f"data/banking77/{name}.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))
            with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([rows[0], *rows[1::every]])
        return folder / "train.csv", folder / "test.csv"

    return some
