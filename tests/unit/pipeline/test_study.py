"""The verbs that look before anything is cut, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import paredown
from paredown.cli import main
from paredown.errors import ParedownError
from paredown.importance import criteria
from paredown.pipeline import StudySettings, compare, score_model, sensitivity
from tests.unit.pipeline.conftest import Desk


@pytest.fixture
def asked(desk: Desk) -> StudySettings:
    return StudySettings(str(desk.model), data=str(desk.train), eval=str(desk.test), threads=1)


def test_scores_have_a_figure_per_unit(asked: StudySettings) -> None:
    facts = score_model(asked, criterion="fisher")
    assert {name: len(values) for name, values in facts["values"].items()} == {
        f"layer.{i}.{kind}": units for i in range(3) for kind, units in (("heads", 4), ("neurons", 20))
    }
    assert facts["quality_dense"] == 1.0 and facts["loss"] == "divergence"


def test_labels_give_gradients_of_the_task_loss(desk: Desk) -> None:
    asked = StudySettings(str(desk.model), data=str(desk.train), eval=str(desk.test), threads=1, labels=True)
    ours = score_model(asked, criterion="taylor_gate")
    assert ours["loss"] == "task"
    theirs = score_model(StudySettings(asked.model, asked.data, asked.eval, threads=1), criterion="taylor_gate")
    assert ours["values"]["layer.0.heads"] != theirs["values"]["layer.0.heads"]


def test_each_layer_alone(asked: StudySettings) -> None:
    facts = sensitivity(asked, fractions=(0.25, 0.75))
    rows = facts["rows"]
    counts = {unit: sum(row["unit"] == unit for row in rows) for unit in {row["unit"] for row in rows}}
    assert counts == {"heads": 6, "neurons": 6, "attention": 3, "ffn": 3, "layers": 3}
    assert all(row["drop"]["low"] <= row["drop"]["value"] <= row["drop"]["high"] for row in rows)
    assert all(row["quality"] == pytest.approx(1.0 - row["drop"]["value"]) for row in rows)
    assert all(row["parameters"] < facts["parameters_dense"] for row in rows)
    drops = {(r["unit"], r["layer"], r["fraction"]): r["drop"]["value"] for r in rows}
    for unit, order in facts["most_prunable_first"].items():
        assert sorted(order) == [0, 1, 2]
        means = [np.mean([v for (u, layer, _), v in drops.items() if u == unit and layer == i]) for i in order]
        assert means == sorted(means)


def test_criteria_are_compared_over_seeds(asked: StudySettings) -> None:
    names = ["fisher", "random", "obs"]
    facts = compare(asked, criteria=names, fractions=(0.5,), seeds=2, units=("heads", "neurons"))
    rows = facts["rows"]
    assert {(row["unit"], row["criterion"]) for row in rows} == {(u, n) for u in ("heads", "neurons") for n in names}
    assert all(row["seeds"] == 2 and row["drop"]["low"] <= row["drop"]["value"] <= row["drop"]["high"] for row in rows)
    drop = {(row["unit"], row["criterion"]): row["drop"]["value"] for row in rows}
    assert drop["neurons", "obs"] < drop["neurons", "random"]


def test_every_criterion_is_the_default_and_layers_can_go(asked: StudySettings) -> None:
    facts = compare(asked, units=("layers", "sublayers"), fractions=(0.34,), seeds=1)
    found = {(row["unit"], row["criterion"]) for row in facts["rows"]}
    assert found == {(f"{kind}s", name) for kind in ("layer", "sublayer") for name in criteria(kind)}


def test_what_belongs_to_a_criterion_is_done_without_recovery(asked: StudySettings) -> None:
    """FLAP's bias compensation, and not where something else is asked for."""
    rows = {
        recover: compare(asked, criteria=["flap"], units=["neurons"], fractions=[0.5], recover=recover, seeds=1)["rows"]
        for recover in ("none", "compensate", "reconstruct")
    }
    assert rows["none"] == rows["compensate"] != rows["reconstruct"]


def test_reconstruction_helps_a_comparison(asked: StudySettings) -> None:
    plain, fitted = (
        compare(asked, criteria=["magnitude"], units=("neurons",), fractions=(0.5,), seeds=1, recover=how)["rows"][0]
        for how in ("none", "reconstruct")
    )
    assert fitted["drop"]["value"] < plain["drop"]["value"]


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"units": ("blocks",)}, "no unit 'blocks'"),
        ({"fractions": (1.2,)}, "shares above 0 and below 1"),
        ({"recover": "magic"}, "no recovery 'magic'"),
        ({"criteria": ["nonsense"]}, "no 'nonsense'"),
        ({"criteria": ["block_influence"]}, "block_influence ranks none of heads, neurons"),
    ],
)
def test_what_is_not_there_is_named(asked: StudySettings, about: dict[str, object], said: str) -> None:
    with pytest.raises(ParedownError, match=said):
        compare(asked, **about)  # type: ignore[arg-type]


def test_labels_must_be_there(desk: Desk, tmp_path: Path) -> None:
    plain = tmp_path / "plain.csv"
    plain.write_text("text\n" + "\n".join(line.split(",")[0] for line in desk.train.read_text().splitlines()[1:]))
    with pytest.raises(ParedownError, match="leave --labels out"):
        score_model(StudySettings(str(desk.model), str(plain), str(desk.test), labels=True), criterion="fisher")


def test_the_commands_leave_a_page_and_lines(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = [str(desk.model), "--data", str(desk.train), "--eval", str(desk.test), "--threads", "1"]
    out = tmp_path / "study"
    assert main(["score", *about, "--criterion", "activation-norm", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "L0" in shown and "█" in shown
    assert (
        main(
            [
                "compare",
                *about,
                "--criteria",
                "l1,random",
                "--fractions",
                "30%,.5",
                "--seeds",
                "1",
                "--json",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in (out / "compare.jsonl").read_text().splitlines()]
    assert lines[1:] == facts["rows"] and lines[0]["quality_metric"] == "accuracy"
    assert main(["sensitivity", *about, "--units", "neurons", "--fractions", ".5", "--out", str(out)]) == 0
    for verb, word in (
        ("score", "Importance by activation_norm"),
        ("compare", "Criteria compared"),
        ("sensitivity", "each layer"),
    ):
        page = (out / f"{verb}.html").read_text()
        assert word in page and "<svg" in page and "http" not in page.replace("http-equiv", "")


def test_bad_shares_are_one_sentence(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    about = [str(desk.model), "--data", str(desk.train)]
    assert main(["compare", *about, "--fractions", "a,b"]) == 2
    assert "error: 'a' is not a share" in capsys.readouterr().err


def test_the_verbs_are_public() -> None:
    assert paredown.compare is compare and paredown.sensitivity is sensitivity
