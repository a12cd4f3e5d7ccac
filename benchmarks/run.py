"""Runs benchmarks through the public command and records what came out, one JSON line each, in results.jsonl.

    PAREDOWN_ASSETS=../shared scripts/bench banking77 banking77-untrained banking77-twice newsgroups

Nothing else should run on the machine meanwhile. The last line of stdout is JSON: the records of this call. The table
in README.md is made from results.jsonl by benchmarks/table.py.
"""

from __future__ import annotations

import csv
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cnn
import cnn_convolution
import cnn_criteria
import inputs
import scoring_cost
import sparse
import unpadding
from commands import environment, paredown
from inputs import WORK

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"


def main(names: Sequence[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        print(f"usage: benchmarks/run.py NAME...; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    WORK.mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    for name in names:
        for record in BENCHMARKS[name]():
            stamped = {"benchmark": name, "date": datetime.date.today().isoformat(), "commit": _commit(), **record}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(stamped) + "\n")
            records.append(stamped)
    print(
        json.dumps(
            [{key: record.get(key) for key in ("benchmark", "step", "verdict", "accepted")} for record in records]
        )
    )
    return 0


def banking77() -> list[dict[str, Any]]:
    """The main job: at most one point of accuracy, twenty minutes of distillation."""
    return [_prune("banking77", *inputs.banking77(), "--max-drop", "1%", "--minutes", "20")]


def banking77_untrained() -> list[dict[str, Any]]:
    """The same without training."""
    return [_prune("banking77-untrained", *inputs.banking77(), "--max-drop", "1%", "--minutes", "0")]


def banking77_twice() -> list[dict[str, Any]]:
    """A speed asked for, and then found again three times in fresh processes."""
    made = _prune("banking77-twice", *inputs.banking77(), "--speedup", "2", "--minutes", "2")
    if made["exit_code"] != 0:
        return [made]
    again = [
        {
            "step": f"validate {i}",
            **paredown("validate", str(WORK / "banking77-twice"), "--eval", inputs.banking77()[-1]),
        }
        for i in (1, 2, 3)
    ]
    return [made, *again]


def newsgroups() -> list[dict[str, Any]]:
    """A sentence encoder on long texts, at a mean cosine of 0.98 or better; then its Spearman drop on STS-B."""
    train, test = inputs.newsgroups()
    made = _prune(
        "newsgroups", str(inputs.minilm()), "--data", train, "--eval", test, "--max-drop", "2%", "--minutes", "5"
    )
    if made["exit_code"] != 0:
        return [made]
    columns = ("--text-column", "6", "--pair-column", "7", "--score-column", "5")
    stsb = str(inputs.assets() / "data/stsb/original_sts-test.tsv")
    similar = paredown("validate", str(WORK / "newsgroups"), "--eval", stsb, *columns)
    return [made, {"step": "validate on STS-B", **similar}]


def criteria() -> list[dict[str, Any]]:
    """Every criterion against the random control, three draws of calibration texts, nothing recovered."""
    return [_compare(*inputs.banking77(), "--units", "heads,neurons", "--fractions", ".3,.5")]


def criteria_refitted() -> list[dict[str, Any]]:
    """What the best of them lose once what is left is re-fitted in closed form."""
    names = ("--criteria", "fisher,flap,l2,obs,random,taylor_gate,wanda")
    return [_compare(*inputs.banking77(), *names, "--fractions", ".3,.4,.5", "--recover", "reconstruct")]


def amounts() -> list[dict[str, Any]]:
    """A quarter of the heads and of the neurons and a layer, with fifteen minutes of distillation."""
    return [_prune("amounts", *inputs.banking77(), *_QUARTER, "--layers", "1", "--minutes", "15")]


def rounds() -> list[dict[str, Any]]:
    """Half of the heads and of the neurons at once and in three rounds, with as many training steps in all."""
    half = ("--heads", "50%", "--neurons", "50%", "--steps", "240")
    return [_prune(f"rounds-{n}", *inputs.banking77(), *half, "--rounds", str(n)) for n in (1, 3)]


def decoder() -> list[dict[str, Any]]:
    """Perplexity of a language model by criterion, published ones as published; then checkpoints of one width."""
    model, text = (
        str(inputs.assets() / "models/stories260k"),
        str(inputs.assets() / "data/tinystories/tinystories_cased_940k.txt"),
    )
    given = (model, "--data", text)
    width = ("--units", "neurons,heads", "--fractions", ".1,.2,.3")
    depth = ("--units", "layers", "--fractions", ".2")
    found = []
    for what in (width, depth):
        found.append(_compare(*given, *what, seeds=1))
        found.append(_compare(*given, *what, "--criteria", OURS[what[1]], "--recover", "reconstruct", seeds=1))
    for amount in ("--neurons 10%", "--neurons 20%", "--neurons 30%", "--layers 1"):
        how = ("--uniform", "--recover", "reconstruct", *amount.split())
        found.append(_prune(f"decoder{amount.replace(' ', '').strip('%')}", *given, *how))
    return found


def fewshot() -> list[dict[str, Any]]:
    """What is learnt from 1 to 10 texts per intent on frozen embeddings, dense and with a quarter of its units gone."""
    train, test = inputs.banking77()[2::2]
    clinc = str(inputs.assets() / "data/clinc150/data_full.json")
    found = []
    for name, data in (("banking77", ("--data", train, "--eval", test)), ("clinc150", ("--data", clinc))):
        made = _prune(f"fewshot-{name}", str(inputs.minilm()), *data, *_QUARTER, "--minutes", "5")
        found.append(made)
        beside = ("--against", str(WORK / f"fewshot-{name}")) if made["exit_code"] == 0 else ()
        learnt = paredown("fewshot", str(inputs.minilm()), *data, *beside, "--shots", "1,2,3,5,10", "--seeds", "10")
        found.append({"step": f"fewshot {name}", **learnt})
    return found


def tokens() -> Iterator[dict[str, Any]]:
    """What 50 and 60 % of the tokens gain and lose on long posts; the policy chosen there, on short questions."""
    train, test = inputs.bodies()
    for target, scorers in (("torch", "learned,norm"), ("onnxruntime", "learned")):
        asked = ("tokens", "sweep", str(inputs.minilm()), "--target", target, "--max-length", "256")
        out = WORK / f"tokens-{target}"
        shutil.rmtree(out, ignore_errors=True)
        grid = ("--scorers", scorers, "--after", "17%,33%", "--keep", "0.5,0.6", "--max-drop", "1.5%")
        made = paredown(*asked, "--data", train, "--eval", test, *grid, "--out", str(out))
        yield {"step": f"sweep newsgroups {target}", **made}
        for name, data in inputs.intents().items() if made["accepted"] else ():
            yield {"step": f"policy on {name} {target}", **paredown(*asked, *data, "--policy", str(out))}


def tokens_half() -> Iterator[dict[str, Any]]:
    """Half of the tokens of long posts after a third of the layers, judged on all guardrail texts, on every engine."""
    train, test = inputs.bodies()
    half = ("--scorers", "learned", "--after", "33%", "--keep", "0.5", "--max-drop", "1.5%", "--max-length", "256")
    for target in ("torch", "onnxruntime", "openvino"):
        asked = ("tokens", "sweep", str(inputs.minilm()), "--data", train, "--eval", test, "--target", target)
        yield {"step": f"half newsgroups {target}", **paredown(*asked, *half)}


def tokens_scorers() -> Iterator[dict[str, Any]]:
    """Every scorer at one speed, merging, and the linear exit, on long posts; scorers in a classifier of questions."""
    train, test = inputs.bodies()
    asked = ("tokens", "sweep", str(inputs.minilm()), "--data", train, "--eval", test, "--max-length", "256")
    half = ("--keep", "0.5", "--after", "33%")
    every = ("--scorers", "learned,norm,attention,cls_attention,key_norm,random,last")
    third = ("--keep", "0.6", "--after", "33%")
    yield {"step": "scorers banking77", **paredown("tokens", "sweep", *inputs.banking77(), *third, *every)}
    yield {"step": "scorers newsgroups", **paredown(*asked, *half, *every)}
    yield {
        "step": "bf16 newsgroups",
        **paredown(*asked, *half, "--scorers", "learned,norm", "--precision", "bf16"),
    }
    yield {
        "step": "exit newsgroups",
        **paredown(*asked, *half, "--scorers", "learned,norm,attention", "--exit"),
    }
    yield {"step": "merge newsgroups", **paredown(*asked, *half, "--action", "merge")}


def tokens_search() -> Iterator[dict[str, Any]]:
    """One (s, q, l) for two sets of short questions and a fifth of the long posts."""
    part = WORK / "newsgroups-fifth.csv"
    with (
        open(inputs.bodies()[0], encoding="utf-8", newline="") as file,
        part.open("w", encoding="utf-8", newline="") as out,
    ):
        rows = list(csv.reader(file))
        csv.writer(out).writerows([rows[0], *rows[1::5]])
    clinc = str(inputs.assets() / "data/clinc150/data_full.json")
    tasks = ",".join([str(inputs.assets() / "data/banking77/train.csv"), clinc, str(part)])
    grid = ("--s", "15,32,64,128", "--q", "0.3,0.5,0.7", "--l", "1,2,3", "--shots", "5")
    asked = (
        "tokens",
        "search",
        str(inputs.minilm()),
        "--tasks",
        tasks,
        "--max-length",
        "256",
        "--max-drop",
        "1%",
        *grid,
    )
    for scorer in ("attention", "learned"):
        yield {"step": f"search {scorer}", **paredown(*asked, "--scorer", scorer)}


def tokens_unpadding() -> list[dict[str, Any]]:
    """Dense against unpadded on batches of 64 as they come, and as they come sorted, with the largest difference."""
    questions = [(name, data[1]) for name, data in inputs.intents().items()]
    files = [*questions, ("newsgroups", inputs.bodies()[1])]
    return [{"step": "unpadding", "exit_code": 0, **unpadding.measure(str(inputs.minilm()), files)}]


def scoring() -> list[dict[str, Any]]:
    """What each criterion costs, in passes over the same texts, and the memory for a quarter of them and for all."""
    return [{"step": "scoring", "exit_code": 0, **scoring_cost.measure(*inputs.banking77()[:3:2])}]


def sparse_products() -> Iterator[dict[str, Any]]:
    """Where sparsity begins to pay, with the widest vectors of the CPU, and held to AVX2 (torch's MKL too)."""
    narrow = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    yield {"step": "as it is", **paredown("bench-sparse")}
    with environment(**narrow, PAREDOWN_SIMD="avx2", ONEDNN_MAX_CPU_ISA="AVX2"):
        yield {"step": "avx2", **paredown("bench-sparse")}


def sparse_encoder() -> list[dict[str, Any]]:
    """A whole MiniLM-L6 at 90 % zeros on every engine; with DeepSparse where DEEPSPARSE_PYTHON names it."""
    return [{"step": "encoder", "exit_code": 0, **sparse.encoder(str(inputs.minilm()), WORK)}]


def sparse_curve() -> Iterator[dict[str, Any]]:
    """What zeros cost the classifier without training."""
    for row in sparse.curve(inputs.banking77(), WORK):
        yield {"step": "at once", "exit_code": 0, **row}


def sparse_recovered() -> Iterator[dict[str, Any]]:
    """What a few minutes of training bring back."""
    for row in sparse.recovered(inputs.banking77(), WORK):
        yield {"step": "trained", "exit_code": 0, **row}


def sparse_banking77() -> list[dict[str, Any]]:
    """The public command: 80 % zeros, fifteen minutes."""
    out = WORK / "sparse-banking77"
    shutil.rmtree(out, ignore_errors=True)
    asked = ("--sparsity", "80%", "--minutes", "15", "--max-drop", "1%", "--out", str(out))
    return [{"step": "sparsify", **paredown("sparsify", *inputs.banking77(), *asked)}]


def sparse_perplexity() -> list[dict[str, Any]]:
    """A language model with zeros and no training, by solver."""
    model, text = (
        inputs.assets() / "models/stories260k",
        inputs.assets() / "data/tinystories/tinystories_cased_940k.txt",
    )
    return [{"step": "perplexity", "exit_code": 0, **sparse.perplexity(str(model), text)}]


def cnn_untrained() -> Iterator[dict[str, Any]]:
    """The main job on image classifiers, without training."""
    for name in cnn.NETWORKS:
        yield _prune_network(name, "--max-drop", "1%", "--minutes", "0")


def cnn_trained() -> Iterator[dict[str, Any]]:
    """A speed asked for, and a point of accuracy at most, with twenty minutes of training."""
    for name in cnn.NETWORKS:
        yield _prune_network(name, "--speedup", "1.8", "--max-drop", "1%", "--minutes", "20")


def cnn_int8() -> Iterator[dict[str, Any]]:
    """A speed that the dense networks do not reach in int8 either, with ten minutes of training."""
    for name in cnn.NETWORKS:
        yield _prune_network(name, "--speedup", "2.6", "--max-drop", "1%", "--minutes", "10")


def cnn_drop() -> Iterator[dict[str, Any]]:
    """A point of accuracy at most, with twenty minutes of training."""
    for name in cnn.NETWORKS:
        yield _prune_network(name, "--max-drop", "1%", "--minutes", "20")


def _prune_network(name: str, *how: str) -> dict[str, Any]:
    archive = str(inputs.assets() / "data/cifar10/cifar10.npz")
    weights = str(inputs.assets() / f"models/cifar10-{name}/model.safetensors")
    pictures = ("--data", archive, "--eval", archive, "--mean", ".485,.456,.406", "--std", ".229,.224,.225")
    with environment(PYTHONPATH=str(HERE.parent / "tests" / "real")):  # the network as a user has it
        return _prune(f"cnn-{name}", f"cifar_resnet:{name}", "--weights", weights, *pictures, *how)


def cnn_compared() -> Iterator[dict[str, Any]]:
    """Every criterion for channels against the random control, three draws of pictures, by what follows the cut."""
    with environment(PYTHONPATH=str(HERE.parent / "tests" / "real")):
        for recover in cnn_criteria.RECOVERIES:
            found = _compare(*cnn_criteria.asked(inputs.assets(), recover), seeds=cnn_criteria.SEEDS)
            yield {**found, "step": f"compare {recover}"}


def cnn_torch_pruning() -> Iterator[dict[str, Any]]:
    """Cut by Torch-Pruning and by us to equal arithmetic, trained alike; what this commit recorded is passed over."""
    for record in cnn.side_by_side(inputs.assets(), WORK, recorded=_recorded("cnn-torch-pruning")):
        yield {"exit_code": 0, **record}


def one_convolution() -> list[dict[str, Any]]:
    """A convolution with half of its outputs gone, against the factor of two that its arithmetic promises."""
    return [{"step": "convolution", "exit_code": 0, **cnn_convolution.measure(WORK)}]


_QUARTER = ("--heads", "25%", "--neurons", "25%")
OURS = {"neurons,heads": "obs,ablation", "layers": "removal_loss"}  # the defaults of prune

BENCHMARKS: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
    "banking77": banking77,
    "banking77-untrained": banking77_untrained,
    "banking77-twice": banking77_twice,
    "newsgroups": newsgroups,
    "cnn-untrained": cnn_untrained,
    "cnn-trained": cnn_trained,
    "cnn-int8": cnn_int8,
    "cnn-drop": cnn_drop,
    "cnn-torch-pruning": cnn_torch_pruning,
    "cnn-convolution": one_convolution,
    "cnn-criteria": cnn_compared,
    "criteria": criteria,
    "criteria-refitted": criteria_refitted,
    "amounts": amounts,
    "rounds": rounds,
    "decoder": decoder,
    "scoring": scoring,
    "fewshot": fewshot,
    "sparse-products": sparse_products,
    "sparse-encoder": sparse_encoder,
    "sparse-curve": sparse_curve,
    "sparse-recovered": sparse_recovered,
    "sparse-banking77": sparse_banking77,
    "sparse-perplexity": sparse_perplexity,
    "tokens": tokens,
    "tokens-half": tokens_half,
    "tokens-scorers": tokens_scorers,
    "tokens-search": tokens_search,
    "tokens-unpadding": tokens_unpadding,
}


def _recorded(benchmark: str) -> set[str]:
    """The steps of a benchmark of which this commit has a record."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []
    return {row["step"] for row in rows if (row["benchmark"], row["commit"]) == (benchmark, _commit())}


def _prune(name: str, *arguments: str) -> dict[str, Any]:
    for leftover in (
        WORK / name,
        WORK / f"{name}-rejected",
        WORK / f".{name}.work",
    ):  # of other code, perhaps
        shutil.rmtree(leftover, ignore_errors=True)
    return {"step": "prune", **paredown("prune", *arguments, "--out", str(WORK / name))}


def _compare(*arguments: str, seeds: int = 3) -> dict[str, Any]:
    return {"step": "compare", **paredown("compare", *arguments, "--seeds", str(seeds))}


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
