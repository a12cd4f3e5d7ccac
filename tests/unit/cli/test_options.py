"""What the options are, what they turn into, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

from paredown.cli import main
from paredown.cli._app import command
from paredown.cli._values import amount, deviations, figures, picture_size, share

if TYPE_CHECKING:
    from conftest import Fake

PRUNE = ["prune", "./model", "--data", "train.csv", "--out", "slim"]

STUDY = "--data --eval --text-column --label-column --labels --max-length --out --threads --seed --json "
STUDY += "--weights --mean --std --size"

# What users have in their scripts: a name may be added, none may go.
FROZEN = {
    "prune": "--data --eval --task --text-column --label-column --pair-column --score-column --max-length --max-drop "
    "--speedup --latency-ms --minutes --confidence --target --uniform --tokens --out --config --threads --seed --json "
    "--heads --queries --neurons --layers --sublayers --parameters --criterion --depth-criterion --ranking --protect "
    "--minimum-heads --minimum-neurons --weights --mean --std --size --channels --macs --minimum-channels "
    "--multiple-of --whole --layer-shares --by-sensitivity --mirrored "
    "--rounds --schedule --recover --lora --steps",
    "sparsify": "--data --eval --task --text-column --label-column --pair-column --score-column --max-length "
    "--max-drop --sparsity --pattern --solver --allocation --permute --rounds --schedule --recover --steps --minutes "
    "--confidence --heads --queries --neurons --layers --sublayers --parameters --criterion --target --out --config "
    "--threads --seed --json",
    "bench-sparse": "--sizes --sparsity --pattern --tokens --device --rounds --out --threads --seed --json",
    "validate": "--eval --text-column --label-column --pair-column --score-column --max-drop --confidence --reference "
    "--threads --seed --json --weights",
    "bench": "--eval --text-column --target --batch-size --threads --json --weights --size",
    "inspect": "--json",
    "demo": "--out --minutes --json",
    "score": f"--criterion {STUDY}",
    "sensitivity": f"--units --fractions --criterion --recover {STUDY}",
    "compare": f"--criteria --units --fractions --recover --ranking --seeds {STUDY}",
    "fewshot": "--data --eval --against --shots --seeds --text-column --label-column --max-length --out --threads "
    "--seed --json",
}
ARGUMENTS = {"prune": ["model"], "validate": ["bundle"], "bench": ["a", "b"], "inspect": ["bundle"], "demo": []}
ARGUMENTS |= {"bench-sparse": []}
ARGUMENTS |= {verb: ["model"] for verb in ("sparsify", "score", "sensitivity", "compare", "fewshot")}

# Verbs of two words, likewise.
TOKENS = "--text-column --max-drop --target --max-length --out --threads --seed --json"
LEARNT = "--data --eval --text-column --pair-column --score-column --eval-text-column --max-length --epochs --minutes "
LEARNT += "--steps --batch-size --learning-rate --out --threads --seed --json"
FROZEN |= {
    "tokens sweep": f"--data --eval --label-column --keep --scorers --after --rule --action --least --exit "
    f"--policy --precision --confidence {TOKENS}",
    "tokens search": f"--tasks --label-column --s --q --l --scorer --shots --seeds {TOKENS}",
    "embedder train": f"--negative-column --label-column --minimum-score {LEARNT}",
    "embedder distill": f"--layers --keep-layers {LEARNT}",
}
ARGUMENTS |= {"tokens sweep": ["model"], "tokens search": ["model"]}
ARGUMENTS |= {"embedder train": ["model"], "embedder distill": ["teacher"]}


def verbs() -> dict[str, Any]:
    """Every subcommand by its words."""
    found: dict[str, Any] = {}
    for name, one in command().commands.items():
        inner = getattr(one, "commands", None)
        found |= {name: one} if inner is None else {f"{name} {word}": each for word, each in inner.items()}
    return found


def options(verb: str) -> set[str]:
    return {name for p in verbs()[verb].params if p.param_type_name == "option" for name in p.opts}


def test_the_set_of_options_is_frozen() -> None:
    assert set(verbs()) == set(FROZEN)
    for verb, names in FROZEN.items():
        assert options(verb) == set(names.split()), verb
        arguments = [p.name for p in verbs()[verb].params if p.param_type_name == "argument"]
        assert arguments == ARGUMENTS[verb]
    assert {name for p in command().params for name in p.opts} == {"--version"}


@pytest.mark.parametrize("verb", ["prune", "sparsify", "validate", "bench"])
def test_options_and_defaults_are_those_of_the_python_verb(verb: str) -> None:
    from paredown import pipeline

    wanted = {n: p.default for n, p in inspect.signature(getattr(pipeline, verb)).parameters.items() if n != "progress"}
    found = {p.name: p.default for p in command().commands[verb].params if p.name not in ("config", "json")}
    assert set(found) == set(wanted)
    for name, default in wanted.items():
        assert found[name] == (None if default in (inspect.Parameter.empty, "") else default), name


def test_settings_are_the_fields_that_a_config_may_have() -> None:
    from paredown.pipeline import Settings

    verbs = ("prune", "sparsify")
    found = {p.name for verb in verbs for p in command().commands[verb].params} - {"config", "json"}
    assert found == {each.name for each in dataclasses.fields(Settings)}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1%", 0.01), ("0.01", 0.01), (" 0.5 % ", 0.005), ("0%", 0), ("0", 0), ("50%", 0.5), (0.02, 0.02)],
)
def test_a_share(text: Any, value: float) -> None:
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["1", "0.5", "5", "0.1", 1])
def test_a_share_that_could_mean_two_things_is_refused(text: Any) -> None:
    with pytest.raises(typer.BadParameter, match="could mean .* or .*: write "):
        share(text)


@pytest.mark.parametrize("text", ["-1%", "101%", "nan", "inf%", "one", "", "%", "0,5%", "-0.01"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="write 1% or 0.01"):
        share(text)


def test_one_says_how_to_write_it(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "--max-drop", "1"]) == 2
    assert "write 1% or 0.01" in capsys.readouterr().err
    assert not fake.calls


def test_prune_hands_every_option_on(fake: Fake) -> None:
    given = {
        **{"eval": "test.csv", "task": "text-embedding", "text_column": "t", "label_column": "l", "pair_column": "p"},
        **{"score_column": "s", "max_length": 99, "max_drop": 0.02, "speedup": 2.5, "minutes": 3.0, "confidence": 0.8},
        **{"target": "openvino", "tokens": "policy", "threads": 2, "seed": 7},
    }
    amounts = {"heads": 0.25, "queries": 0.125, "neurons": 0.3, "layers": 1.0, "sublayers": 2.0, "parameters": 0.5}
    given |= {
        **amounts,
        **{"criterion": "taylor_gate", "depth_criterion": "block_influence", "ranking": "layer", "protect": 1},
        **{"minimum_heads": 2, "minimum_neurons": 16},
        **{"rounds": 3, "schedule": "linear", "recover": "finetune", "lora": 8, "steps": 240},
        **{"weights": "w.safetensors", "channels": 0.25, "macs": 0.75, "minimum_channels": 0.2, "multiple_of": 8},
        **{"whole": "stem", "layer_shares": "a=50%,b=0"},
    }
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    pictures = ["--mean", ".5,.4,.3", "--std", "1,2,.5", "--size", "224x192", "--by-sensitivity", "--not-mirrored"]
    assert main([*PRUNE, *words, *pictures, "--uniform"]) == 0
    assert fake.calls[0][:2] == ("prune", ("./model",))
    said = {"mean": (0.5, 0.4, 0.3), "std": (1.0, 2.0, 0.5), "size": (224, 192)}
    said |= {"by_sensitivity": True, "mirrored": False}
    assert fake.asked == {**given, **said, "data": "train.csv", "out": "slim", "uniform": True, "latency_ms": None}


@pytest.mark.parametrize(("text", "value"), [("25%", 0.25), ("0.25", 0.25), ("2", 2), (" 12.5 % ", 0.125), ("0", 0)])
def test_an_amount(text: str, value: float) -> None:
    assert amount(text) == value


@pytest.mark.parametrize("text", ["1.5", "100%", "-1", "nan", "inf", "half", "", "25 percent"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="write 25%, 0.25 or 2"):
        amount(text)


def test_what_is_said_of_pictures() -> None:
    assert figures(".485, .456,0.406") == (0.485, 0.456, 0.406)
    assert figures("0,-1,2") == (0.0, -1.0, 2.0)
    assert deviations("1,2,.5") == (1.0, 2.0, 0.5)
    assert picture_size("224x192") == (224, 192) and picture_size("32") == (32, 32)


@pytest.mark.parametrize(
    ("parser", "text", "said"),
    [
        (figures, "1,2", "three numbers"),
        (figures, "1,2,3,4", "three numbers"),
        (figures, "a,b,c", "three numbers"),
        (figures, "1,nan,3", "three numbers"),
        (deviations, "1,0,1", "not above 0"),
        (picture_size, "0x32", "write 224x224"),
        (picture_size, "32x", "write 224x224"),
        (picture_size, "3x2x1", "write 224x224"),
    ],
)
def test_what_says_nothing_of_pictures_is_refused(parser: Callable[[str], object], text: str, said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        parser(text)


def test_without_a_dial_the_pipeline_chooses(fake: Fake) -> None:
    assert main(PRUNE) == 0
    assert (fake.asked["max_drop"], fake.asked["speedup"], fake.asked["latency_ms"]) == (None, None, None)


def test_a_drop_may_accompany_a_speedup(fake: Fake) -> None:
    assert main([*PRUNE, "--max-drop", "1%", "--speedup", "2"]) == 0
    assert (fake.asked["max_drop"], fake.asked["speedup"]) == (0.01, 2.0)


def test_two_dials_are_refused(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "--latency-ms", "4", "--speedup", "2"]) == 2
    assert capsys.readouterr().err == "error: there is one dial: give --speedup or --latency-ms, not both\n"
    assert not fake.calls


# ---------------------------------------------------------------------------------------------------------- --config


def config(folder: Path, text: str) -> list[str]:
    path = folder / "run.toml"
    path.write_text(text)
    return ["--config", str(path)]


def test_a_run_described_by_a_file(fake: Fake, tmp_path: Path) -> None:
    text = 'model = "m"\ndata = "d.csv"\nout = "o"\nmax_drop = "2%"\nuniform = true\nminutes = 5\nseed = 3\n'
    assert main(["prune", *config(tmp_path, text)]) == 0
    assert fake.calls[0][1] == ("m",)
    expected = {"data": "d.csv", "out": "o", "max_drop": 0.02, "uniform": True, "minutes": 5.0, "seed": 3}
    assert expected.items() <= fake.asked.items()
    assert fake.asked["confidence"] == 0.9


def test_options_win_over_the_file(fake: Fake, tmp_path: Path) -> None:
    given = config(tmp_path, 'model = "m"\ndata = "d.csv"\nminutes = 5\nmax_drop = 0.02\nspeedup = 3\n')
    assert main([*PRUNE, "--minutes", "20", "--latency-ms", "4", *given]) == 0
    assert fake.calls[0][1] == ("./model",)
    assert (fake.asked["data"], fake.asked["minutes"]) == ("train.csv", 20.0)  # 20 is also the default
    assert (fake.asked["max_drop"], fake.asked["speedup"], fake.asked["latency_ms"]) == (0.02, None, 4.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-drop = 0.01", "there is no setting 'max-drop'; there are model, data, eval"),
        ("json = true", "there is no setting 'json'"),
        ("[prune]\nminutes = 5", "there is no setting 'prune'"),
        ("minutes = ", "run.toml is not a TOML file"),
        ('minutes = "ten"', "'--minutes'"),
        ("seed = 1.5", "'--seed'"),
        ('eval = ["a", "b"]', "eval cannot be ['a', 'b']"),
        ("eval = true", "eval cannot be True"),
        ("uniform = 1", "uniform cannot be 1"),
        ("max_drop = 1", "write 1% or 0.01"),
        ('target = "tensorrt"', "'tensorrt' is not one of 'onnxruntime', 'openvino', 'torch'"),
        ("speedup = 2\nlatency_ms = 4", "one dial"),
    ],
)
def test_a_file_that_is_wrong(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert main([*PRUNE, *config(tmp_path, text)]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.startswith("error: ")
    assert (shown.err.count("\n"), shown.out, fake.calls) == (1, "", [])


def test_a_file_that_is_not_there(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "--config", str(tmp_path / "no.toml")]) == 2
    assert "no.toml is not there" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- the other verbs


def test_validate_hands_every_option_on(fake: Fake) -> None:
    words = (
        "validate slim --eval t.csv --text-column t --label-column l --pair-column p --score-column s "
        "--max-drop 2% --confidence 0.8 --reference m --weights w --threads 2 --seed 7"
    )
    assert main(words.split()) == 0
    assert fake.calls[0][:2] == ("validate", ("slim",))
    assert fake.asked == {
        **{"eval": "t.csv", "text_column": "t", "label_column": "l", "pair_column": "p", "score_column": "s"},
        **{"max_drop": 0.02, "confidence": 0.8, "reference": "m", "weights": "w", "threads": 2, "seed": 7},
    }


def test_bench_hands_every_option_on(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.facts = {"rows": [{"name": "a", "texts_per_second": 10.0}, {"name": "b", "texts_per_second": 1050.0}]}
    words = "bench a b --eval t.csv --text-column t --target torch --batch-size 8 --threads 2 --weights w --size 32"
    assert main(words.split()) == 0
    assert fake.calls[0][:2] == ("bench", ("a", "b"))
    expected = {"eval": "t.csv", "text_column": "t", "target": "torch", "batch_size": 8, "threads": 2}
    assert fake.asked == {**expected, "weights": "w", "size": (32, 32)}
    assert "1,050" in capsys.readouterr().out


def test_demo_hands_every_option_on(fake: Fake) -> None:
    assert main(["demo", "--out", "there", "--minutes", "0.5"]) == 0
    assert fake.calls == [("demo", ("there",), {"minutes": 0.5})]
