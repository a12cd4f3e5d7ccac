"""The machine card."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from paredown.cores import cores
from paredown.validation import machine


def test_the_card_is_json_and_knows_this_process() -> None:
    card = machine.card()
    assert json.loads(json.dumps(card)) == card
    assert set(card) == {"cpu", "flags", "cores", "memory_gib", "system", "python", "libraries"}
    assert card["cpu"]
    assert card["cores"] == cores() >= 1
    assert card["memory_gib"] > 0
    assert card["libraries"]["torch"] == version("torch") == torch.__version__
    assert set(card["flags"]) <= set(machine.FLAGS)


def test_flags_are_whole_words(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name : A CPU: fast\nflags : fpu avx2 avx512f_not amx_int8\n")
    name, flags = machine._cpu(path)
    assert name == "A CPU: fast"
    assert flags & set(machine.FLAGS) == {"avx2", "amx_int8"}
    name, flags = machine._cpu(tmp_path / "missing")
    assert name
    assert not flags


def test_the_card_imports_nothing_to_find_versions() -> None:
    code = "import sys; from paredown.validation.machine import card; card(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
