"""The verbs that look before anything is cut, on a small residual network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from paredown.cli import main
from paredown.errors import ParedownError, UnsupportedModel
from paredown.importance import criteria
from paredown.pipeline import StudySettings, _network_study, compare, score_model, sensitivity

CODE = "from {name} import Net as net\n\n\ndef broken():\n    raise ValueError('no such thing')\n"
CHANNELS = {"conv": 8, "block.0": 12, "last": 16}


class Net(nn.Module):
    """A stem, a residual block, and a layer that widens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        inside = nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.block = nn.Sequential(*inside, nn.BatchNorm2d(8))
        self.last, self.norm2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.relu(x + self.block(x))
        x = F.relu(self.norm2(self.last(x)))
        answer: Tensor = self.linear(x.mean((2, 3)))
        return answer


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network's code, its weights, and pictures whose class it says itself."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "nets_to_study.py").write_text(CODE.format(name=__name__))
    torch.manual_seed(0)
    model, rng = Net(), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (320, 1, 1, 3)) + rng.integers(-60, 60, (320, 10, 10, 3))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    x = torch.from_numpy(pixels / 255.0).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(60):  # statistics of batch norm
            model(x)
        model.eval()
        answers = model(x)
        model.linear.bias -= answers.mean(0)
        model.linear.weight *= 30
        model.linear.bias *= 30
        labels = model(x).argmax(1).numpy()
    assert np.bincount(labels, minlength=4).min() >= 10
    save_file(model.state_dict(), folder / "weights.safetensors")
    np.savez(folder / "data.npz", x_train=pixels[:160], y_train=labels[:160], x_test=pixels[160:], y_test=labels[160:])
    return folder


@pytest.fixture
def asked(desk: Path, monkeypatch: pytest.MonkeyPatch) -> StudySettings:
    monkeypatch.syspath_prepend(str(desk))
    data, weights = str(desk / "data.npz"), str(desk / "weights.safetensors")
    still = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return StudySettings("nets_to_study:net", data, data, weights=weights, threads=1, **still)  # type: ignore[arg-type]


def test_scores_have_a_figure_per_channel(asked: StudySettings) -> None:
    facts = score_model(asked, criterion="fisher")
    assert {name: len(values) for name, values in facts["values"].items()} == CHANNELS == facts["groups"]
    assert facts["quality_dense"] == 1.0 and facts["loss"] == "divergence" and facts["unit"] == "channels"
    assert facts == score_model(asked, criterion="fisher")
    labelled = score_model(replace(asked, labels=True), criterion="fisher")
    assert labelled["loss"] == "task" and labelled["values"] != facts["values"]


def test_a_module_is_studied_too(asked: StudySettings) -> None:
    facts = score_model(replace(asked, model=Net().eval(), weights=None), criterion="l2")
    assert facts["model"] == "Net" and {name: len(found) for name, found in facts["values"].items()} == CHANNELS


def test_each_layer_alone(asked: StudySettings) -> None:
    facts = sensitivity(asked)
    rows = facts["rows"]
    shares: dict[tuple[str, str], list[float]] = {(row["unit"], row["layer"]): [] for row in rows}
    for row in rows:
        shares[row["unit"], row["layer"]].append(row["fraction"])
    assert shares.pop(("branches", "block.0")) == [1.0]
    assert {name for _, name in shares} == set(CHANNELS)
    assert all(found == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7] for found in shares.values())
    assert all(row["drop"]["low"] <= row["drop"]["value"] <= row["drop"]["high"] for row in rows)
    assert all(row["quality"] == pytest.approx(1.0 - row["drop"]["value"]) for row in rows)
    assert all(row["parameters"] < facts["parameters_dense"] and row["macs"] < facts["macs_dense"] for row in rows)
    assert facts["criterion"] == {"channels": "obs"} and facts["recover"] == "none"
    order = facts["most_prunable_first"]
    assert order["branches"] == ["block.0"] and set(order["channels"]) == set(CHANNELS)
    drops = {
        name: np.mean([r["drop"]["value"] for r in rows if r["layer"] == name and r["unit"] == "channels"])
        for name in CHANNELS
    }
    assert [drops[name] for name in order["channels"]] == sorted(drops.values())


def test_what_reads_a_cut_layer_is_refitted(asked: StudySettings) -> None:
    """By statistics taken once, as well as by a pass over the pictures for every cut; the block's group is read by one
    layer alone.
    """
    found = {}
    for recover in ("none", "reconstruct"):
        rows = sensitivity(asked, criterion="random", fractions=(0.3, 0.6), recover=recover)["rows"]
        found[recover] = {(row["layer"], row["fraction"]): row["divergence"] for row in rows}
    plain, fitted = found.values()
    assert all(fitted[key] < plain[key] for key in plain if key[0] in ("block.0", "last") and key[1] < 1)
    assert np.mean(list(fitted.values())) < 0.5 * np.mean(list(plain.values()))


def test_criteria_are_compared_over_seeds(asked: StudySettings) -> None:
    names = ["obs", "l2", "random"]
    facts = compare(asked, criteria=names, fractions=(0.25, 0.5), seeds=2)
    rows = {(row["criterion"], row["fraction"]): row for row in facts["rows"]}
    assert set(rows) == {(name, share) for name in names for share in (0.25, 0.5)}
    assert all(row["seeds"] == 2 and row["unit"] == "channels" for row in rows.values())
    assert all(0 < row["macs"] < facts["macs_dense"] for row in rows.values())
    assert rows["l2", 0.5]["macs"] < rows["l2", 0.25]["macs"]
    assert facts["whole"] == ["conv"] and facts["ranking"] == "global"
    assert facts == compare(asked, criteria=names, fractions=(0.25, 0.5), seeds=2)


def test_a_comparison_by_layer_and_with_recovery(asked: StudySettings) -> None:
    found = {
        recover: compare(asked, fractions=(0.5,), recover=recover, ranking="layer", seeds=1)["rows"]
        for recover in ("none", "statistics", "reconstruct")
    }
    for rows in found.values():
        assert {row["criterion"] for row in rows} == set(criteria("channel"))
        assert len({row["macs"] for row in rows}) == 1  # the same share of every layer
    loss = {recover: np.mean([row["divergence"] for row in rows]) for recover, rows in found.items()}
    assert loss["reconstruct"] < loss["statistics"] < loss["none"]


def test_large_networks_are_judged_on_fewer_pictures(asked: StudySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_network_study, "JUDGED_MACS", 1)
    monkeypatch.setattr(_network_study, "FEWEST_JUDGED", 40)
    facts = sensitivity(asked, fractions=(0.5,), units=["channels"])
    assert facts["samples"] == 40 and any("40 of 96 guardrail pictures judge" in note for note in facts["notes"])


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"units": ("heads",)}, "no unit 'heads'; choose among channels"),
        ({"fractions": (1.2,)}, "shares above 0 and below 1"),
        ({"recover": "compensate"}, "no recovery 'compensate' here; choose none, statistics, reconstruct"),
        ({"criteria": ["nonsense"]}, "no 'nonsense'"),
        ({"criteria": ["flap"]}, "flap does not rank channels; .*obs.* do"),
    ],
)
def test_what_is_not_there_is_named(asked: StudySettings, about: dict[str, Any], said: str) -> None:
    with pytest.raises(ParedownError, match=said):
        compare(asked, **about)


def test_what_is_for_texts_is_refused(asked: StudySettings) -> None:
    with pytest.raises(ParedownError, match="text-column is for texts"):
        score_model(replace(asked, text_column="text"), criterion="l2")
    with pytest.raises(ParedownError, match="weights is for image classifiers"):
        score_model(replace(asked, model="./nowhere"), criterion="l2")
    with pytest.raises(UnsupportedModel, match="needs its weights"):
        score_model(replace(asked, weights=None), criterion="l2")


def told(asked: StudySettings) -> list[str]:
    words = [str(asked.model), "--data", asked.data, "--eval", str(asked.eval), "--weights", str(asked.weights)]
    return [*words, "--mean", "0,0,0", "--std", "1,1,1", "--threads", "1"]


def test_the_commands_leave_a_page_and_lines(
    asked: StudySettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about, out = told(asked), tmp_path / "study"
    assert main(["score", *about, "--criterion", "activation-norm", "--out", str(out)]) == 0
    assert "block.0" in capsys.readouterr().out
    chosen = ["--criteria", "l1,random", "--fractions", "30%,.5", "--recover", "statistics", "--seeds", "1"]
    assert main(["compare", *about, *chosen, "--json", "--out", str(out)]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in (out / "compare.jsonl").read_text().splitlines()]
    assert lines[1:] == facts["rows"] and lines[0]["recover"] == "statistics"
    assert main(["sensitivity", *about, "--fractions", ".5,.7", "--out", str(out)]) == 0
    assert "Channels block.0, last, conv." in capsys.readouterr().out
    for verb, said in (
        ("score", "as quantiles"),
        ("compare", "multiply-accumulates that went"),
        ("sensitivity", "the share of one layer that went"),
    ):
        page = (out / f"{verb}.html").read_text()
        assert said in page and "guardrail pictures" in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "nowhere.safetensors"], "not a readable safetensors file"),
        (["--data", "nowhere.npz"], "there is no file or folder nowhere.npz"),
        (["--criterion", "nonsense"], "no 'nonsense'"),
        (["--criterion", "flap"], "flap does not rank channels"),
        (["--mean", "1,2"], "is not three numbers"),
        (["--std", "0,1,1"], "not above 0"),
        (["--size", "32"], "the network takes (32, 32)"),
        (["--text-column", "text"], "text-column is for texts"),
    ],
)
def test_bad_input_is_one_sentence(
    asked: StudySettings, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", *told(asked), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_code_that_fails_is_one_sentence(asked: StudySettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *told(replace(asked, model="nets_to_study:broken"))]) == 2
    assert "no such thing" in capsys.readouterr().err
    about = [word for word in told(asked) if word not in ("--weights", asked.weights)]
    assert main(["score", *about]) == 2
    assert "name a safetensors file with --weights" in capsys.readouterr().err
