"""Realistic fact sheets of runs, for the report's tests. The figures are made up, not measured."""

from __future__ import annotations

import copy
from typing import Any


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def candidate(
    name: str, kind: str, rate: float, quality: float | None, *, base: float = 352, **other: Any
) -> dict[str, Any]:
    speed = rate / base
    facts = {
        "name": name,
        "kind": kind,
        "target": "onnxruntime",
        "texts_per_second": rate,
        "latency_ms_p50": 1400 / rate,
        "latency_ms_p90": 1720 / rate,
        "speedup": interval(speed, speed * 0.98, speed * 1.025),
        "quality": quality,
        "drop": None,
        "bound": None,
        "passed": None,
        "chosen": False,
        "parameters": 22_700_000,
        "note": "" if kind == "dense" else "not tried: a faster one passed",
    }
    told = {"note": ""} if "passed" in other else {}
    return {**facts, **told, **other}


def accepted() -> dict[str, Any]:
    """A classifier pruned within one point: whole layer gone, heads and neurons gone, then int8."""
    heads = [(0, 1, 3, 5, 8, 9, 11), (0, 2, 4, 5, 7, 10), (1, 2, 6, 11), (), (3, 7, 8)]
    widths = [768, 640, 512, 384, 256]
    candidates = [
        candidate("dense torch", "dense", 262, 0.9302, target="torch"),
        candidate("dense onnxruntime", "dense", 352, 0.9302),
        candidate("dense openvino", "dense", 339, 0.9302, target="openvino"),
        candidate("dense int8", "dense-int8", 498, None),
        candidate("layers 0, 2, 5 distilled", "layer-drop", 711, 0.9259, parameters=17_400_000),
        candidate(
            "pruned 2x",
            "pruned",
            722,
            0.9297,
            drop=interval(0.0005, -0.0049, 0.0059),
            bound=0.0038,
            parameters=18_100_000,
        ),
        candidate(
            "pruned 4x",
            "pruned",
            1443,
            0.9264,
            drop=interval(0.0038, -0.0027, 0.0103),
            bound=0.0081,
            passed=True,
            parameters=15_000_000,
        ),
        candidate(
            "pruned 4x int8",
            "pruned-int8",
            1842,
            0.9253,
            drop=interval(0.0049, -0.0016, 0.0114),
            bound=0.0092,
            passed=True,
            chosen=True,
            parameters=15_000_000,
        ),
        candidate(
            "pruned 6x",
            "pruned",
            2110,
            0.9199,
            drop=interval(0.0103, 0.0032, 0.0173),
            bound=0.0149,
            passed=False,
            parameters=13_600_000,
        ),
        candidate(
            "pruned 6x int8",
            "pruned-int8",
            2630,
            0.9178,
            drop=interval(0.0124, 0.0054, 0.0195),
            bound=0.0171,
            passed=False,
            parameters=13_600_000,
        ),
        candidate(
            "tf-idf + logistic regression",
            "tfidf",
            9800,
            0.8853,
            target="sklearn",
            drop=interval(0.0449, 0.0335, 0.0563),
            bound=0.0524,
            passed=False,
            parameters=None,
        ),
    ]
    grid = [
        {"batch": b, "length": t, "dense_ms": 0.9 * b**0.86 * t**0.55, "pruned_ms": 0.31 * b**0.8 * t**0.5}
        for b in (1, 8, 32, 64)
        for t in (8, 16, 32, 64)
    ]
    curves = [
        {"candidate": name, "step": 50 * i, "minutes": 0.4 * i * stretch, "distance": start * 0.86**i + end}
        for name, start, end, stretch in (
            ("pruned 4x", 0.6, 0.021, 1.0),
            ("pruned 6x", 1.3, 0.034, 0.9),
            ("layers 0, 2, 5 distilled", 2.4, 0.026, 1.1),
        )
        for i in range(16)
    ]
    return {
        "accepted": True,
        "verdict": "5.2 times as many texts per second, and the accuracy drop is within 1 point.",
        "task": "text-classification",
        "model": "./my-classifier",
        "family": "bert",
        "target": "onnxruntime",
        "objective": {"dial": "max_drop", "value": 0.01, "max_drop": 0.01},
        "confidence": 0.9,
        "quality_metric": "accuracy",
        "quality_dense": 0.9299,
        "quality_pruned": 0.9256,
        "metrics_dense": {"accuracy": 0.9299, "macro_f1": 0.9297},
        "metrics_pruned": {"accuracy": 0.9256, "macro_f1": 0.9249},
        "drop": interval(0.0043, -0.0024, 0.0114),
        "speedup": interval(5.23, 5.11, 5.36),
        "speedup_against": "onnxruntime fp32 dense",
        "latency_ms_p50": {"dense": 4.07, "pruned": 1.18},
        "latency_speedup": interval(3.45, 3.31, 3.58),
        "texts_per_second": {"dense": 352, "pruned": 1842},
        "parameters_dense": 22_742_861,
        "parameters_pruned": 15_012_301,
        "minutes": 19.4,
        "peak_memory_mib": 1213,
        "bundle": "slim/",
        "candidates": candidates,
        "anatomy": {"layers": 6, "heads": 12, "neurons": 1536},
        "kept": [
            {"layer": layer, "heads": list(h), "neurons": n}
            for layer, h, n in zip((0, 1, 2, 3, 5), heads, widths, strict=True)
        ],
        "timings": grid,
        "lengths": {
            "edges": [0, 4, 8, 12, 16, 20, 24, 32, 48, 64],
            "counts": [12, 410, 2903, 2811, 1710, 980, 760, 350, 67],
        },
        "prediction": [
            {"round": 1, "what": "plan 4x", "predicted_ms": 0.702, "measured_ms": 0.741},
            {"round": 2, "what": "plan 4x, solved again", "predicted_ms": 0.688, "measured_ms": 0.693},
            {"round": 1, "what": "plan 6x", "predicted_ms": 0.47, "measured_ms": 0.474},
        ],
        "recovery": curves,
        "machine": {
            "cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz",
            "cores": 2,
            "flags": ["avx2", "fma"],
            "memory_gib": 7.8,
            "system": "Linux 6.1, Debian 12",
            "threads": 2,
        },
        "data": {
            "calibration": 8003,
            "guardrail": 1848,
            "test": 1232,
            "truncated": 3,
            "notes": ["12 texts of --data also stood in --eval and were dropped from calibration."],
        },
        "command": "paredown prune ./my-classifier --data train.csv --eval test.csv --max-drop 1% --out slim/",
        "folds": [
            "6 key biases removed: softmax does not see them",
            "6 value biases folded into the output biases",
            "the unused rows of the token-type table removed",
        ],
        "versions": {
            "paredown": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "onnxruntime": "1.24.1",
            "python": "3.11.2",
        },
        "created": "2026-11-22T14:03:51+00:00",
    }


def rejected() -> dict[str, Any]:
    """Nothing passes; the closest candidate is shown, marked and failed."""
    result = accepted()
    for each in result["candidates"]:
        each["chosen"] = each["name"] == "pruned 2x"
        if each["kind"] != "dense":
            worsen(each, 0.011)
    result.update(
        accepted=False,
        verdict="No candidate met the gate: the closest, pruned 2x, may lose up to 1.48 points; 1 point was allowed.",
        quality_pruned=0.9188,
        metrics_pruned={"accuracy": 0.9188, "macro_f1": 0.9176},
        drop=interval(0.0111, 0.0031, 0.0189),
        speedup=interval(2.05, 2.01, 2.1),
        texts_per_second={"dense": 352, "pruned": 722},
        latency_ms_p50={"dense": 4.07, "pruned": 1.94},
        latency_speedup=interval(2.10, 2.05, 2.16),
        bundle=None,
    )
    return result


def worsen(facts: dict[str, Any], by: float) -> None:
    """Take `by` from a candidate's quality, and fail it."""
    lost = facts["drop"] or interval(0.004, -0.002, 0.010)
    facts["drop"] = {name: end + by for name, end in lost.items()}
    facts.update(quality=0.9302 - facts["drop"]["value"], bound=(facts["bound"] or 0.008) + by, passed=False, note="")


def unpruned() -> dict[str, Any]:
    """The answer is: do not prune, use dense int8."""
    result = accepted()
    for each in result["candidates"]:
        each["chosen"] = each["kind"] == "dense-int8"
        if each["chosen"]:
            each.update(passed=True, quality=0.9254, drop=interval(0.0048, -0.0001, 0.0097), bound=0.0083)
        elif each["kind"] != "dense":
            worsen(each, 0.009)
    result.update(
        verdict="Do not prune: use the dense model in int8, 1.4 times as many texts per second within 1 point.",
        quality_pruned=0.9243,
        metrics_pruned={"accuracy": 0.9243, "macro_f1": 0.9238},
        drop=interval(0.0056, 0.0009, 0.0104),
        speedup=interval(1.41, 1.38, 1.44),
        texts_per_second={"dense": 352, "pruned": 498},
        latency_ms_p50={"dense": 4.07, "pruned": 3.12},
        latency_speedup=interval(1.30, 1.27, 1.34),
        parameters_pruned=22_742_861,
        kept=[],
        folds=[],
        timings=[
            {"batch": 1, "length": 16, "dense_ms": 4.0, "pruned_ms": 4.4},
            {"batch": 8, "length": 16, "dense_ms": 24.0, "pruned_ms": 17.1},
        ],
    )
    return result


def embedding() -> dict[str, Any]:
    """A sentence encoder: quality is a cosine, neurons are cut and no head."""
    result = accepted()
    result.update(
        verdict="1.8 times as many texts per second at a mean cosine of 0.986 to the dense model.",
        task="text-embedding",
        model="sentence-transformers/all-MiniLM-L6-v2",
        objective={"dial": "speedup", "value": 1.8, "max_drop": 0.02},
        quality_metric="cosine",
        quality_dense=1.0,
        quality_pruned=0.9861,
        metrics_dense={"cosine": 1.0, "overlap@10": 1.0, "spearman": 0.8203},
        metrics_pruned={"cosine": 0.9861, "overlap@10": 0.871, "spearman": 0.8174},
        drop=interval(0.0139, 0.0135, 0.0144),
        speedup=interval(1.83, 1.80, 1.86),
        texts_per_second={"dense": 24.1, "pruned": 44.2},
        latency_ms_p50={"dense": 61.3, "pruned": 33.0},
        latency_speedup=interval(1.86, 1.82, 1.9),
        candidates=[
            candidate("dense onnxruntime", "dense", 24.1, 1.0, base=24.1),
            candidate(
                "dense int8",
                "dense-int8",
                33.9,
                0.9712,
                base=24.1,
                drop=interval(0.0288, 0.028, 0.0296),
                bound=0.0293,
                passed=False,
            ),
            candidate(
                "pruned 1.8x",
                "pruned",
                44.2,
                0.9858,
                base=24.1,
                drop=interval(0.0142, 0.0137, 0.0147),
                bound=0.0145,
                passed=True,
                chosen=True,
            ),
            candidate(
                "pruned 1.8x int8",
                "pruned-int8",
                58.4,
                0.9598,
                base=24.1,
                drop=interval(0.0402, 0.0391, 0.0413),
                bound=0.0409,
                passed=False,
            ),
            candidate(
                "layers 0, 1, 4, 5",
                "layer-drop",
                36.0,
                0.9401,
                base=24.1,
                drop=interval(0.0599, 0.0580, 0.0618),
                bound=0.0612,
                passed=False,
            ),
        ],
        kept=[
            {"layer": i, "heads": list(range(12)), "neurons": n} for i, n in enumerate((704, 640, 832, 896, 768, 512))
        ],
        recovery=[],
        lengths={
            "edges": list(range(0, 257, 16)),
            "counts": [20, 130, 310, 450, 520, 610, 580, 540, 470, 420, 390, 350, 310, 280, 250, 5684],
        },
        data={"calibration": 8000, "guardrail": 1900, "test": 1256, "truncated": 4211, "notes": []},
    )
    return result


def language_model() -> dict[str, Any]:
    """A decoder pruned by amounts in two rounds, which repeats itself since."""
    facts = accepted()
    for key in ("prediction", "timings", "parity"):
        facts.pop(key, None)
    facts |= {"task": "causal-lm", "quality_metric": "log_likelihood", "target": "torch"}
    facts["objective"] = {"dial": "amount", "value": "neurons 0.2", "max_drop": None}
    facts |= {"quality_dense": -1.71, "quality_pruned": -1.9, "drop": interval(0.19, 0.15, 0.23)}
    for one in facts["candidates"]:
        one |= {"quality": -1.9, "drop": interval(0.19, 0.15, 0.23), "bound": 0.22}
    facts["pruning_rounds"] = [
        {"round": 1, "parameters": 228_544, "quality_cut": -2.28, "quality": -1.8, "plan_id": "a"},
        {"round": 2, "parameters": 222_400, "quality_cut": -1.93, "quality": -1.83, "plan_id": "b"},
    ]
    figures = {"tokens": 256, "repeated_ngrams": 0.42, "longest_loop": 222, "distinct_1": 0.039}
    figures |= {"distinct_2": 0.168, "distinct_3": 0.27, "tokens_per_second": 349.0}
    worse = figures | {"repeated_ngrams": 0.83, "longest_loop": 256, "tokens_per_second": 380.0}
    facts["generation"] = {"dense": figures, "pruned": worse, "prompts": 16, "warnings": ["The pruned model loops."]}
    return facts


def minimal() -> dict[str, Any]:
    """Every list empty, every optional value None."""
    result = {name: _emptied(value) for name, value in accepted().items()}
    return {**result, "accepted": False, "model": "m", "task": "text-classification", "quality_metric": "accuracy"}


def crowded() -> dict[str, Any]:
    """Many candidates with long names on nearly the same spot, a deep model with whole sub-layers gone."""
    result = accepted()
    result["candidates"] += [
        candidate(
            f"pruned {2 + i / 10:.1f}x recovered by distillation, variant {i}",
            "pruned",
            900 + 25 * i,
            0.9285 - 0.0006 * i,
            drop=interval(0.0017 + 0.0006 * i, -0.004, 0.008),
            bound=0.006 + 0.0007 * i,
            passed=i < 6,
        )
        for i in range(10)
    ]
    result["anatomy"] = {"layers": 24, "heads": 16, "neurons": 4096}
    result["kept"] = [
        {
            "layer": i,
            "heads": list(range(0, 16, 1 + i % 4)) if i % 5 else [],
            "neurons": 0 if i % 7 == 3 else 4096 - 128 * i,
        }
        for i in range(24)
        if i not in (9, 10, 17)
    ]
    return result


def pictures() -> dict[str, Any]:
    """A ResNet-56 on pictures of 32 by 32: channels narrower, residual branches gone, a loss that falls."""
    result = accepted()
    for absent in ("anatomy", "kept", "lengths", "folds"):
        result.pop(absent)
    candidates = [
        candidate("dense onnxruntime", "dense", 352, 0.9437),
        candidate("dense openvino", "dense", 371, 0.9437, target="openvino"),
        candidate("dense int8", "dense-int8", 620, None),
        candidate(
            "pruned 1.8x", "pruned", 655, 0.9391, drop=interval(0.0046, 0.0008, 0.0084), bound=0.0071, passed=True
        ),
        candidate(
            "pruned 1.8x int8",
            "pruned-int8",
            1010,
            0.9384,
            drop=interval(0.0053, 0.0012, 0.0094),
            bound=0.008,
            passed=True,
            chosen=True,
        ),
        candidate(
            "pruned 2.5x", "pruned", 910, 0.9302, drop=interval(0.0135, 0.0085, 0.0185), bound=0.0168, passed=False
        ),
    ]
    for one in candidates:
        one["parameters"] = 855_770 if one["kind"].startswith("dense") else 431_010
    gone = (4, 7, 12, 20, 25)
    groups = [("conv1", 16), ("layers.9.conv2", 32), ("layers.18.conv2", 64)]
    groups += [(f"layers.{i}.conv1", 16 * 2 ** (i // 9)) for i in range(27)]
    lost = {f"layers.{i}.conv1" for i in gone}
    rows = [
        {"group": name, "channels": of, "kept": 0 if name in lost else of - of // 4 * (number % 3)}
        for number, (name, of) in enumerate(groups)
    ]
    return {
        **result,
        "verdict": "Use pruned 1.8x int8: 2.72 times the pictures per second of openvino fp32 dense, −0.55 points "
        "of accuracy on the test split.",
        "task": "image-classification",
        "model": "networks:resnet56",
        "family": "graph",
        "candidates": candidates,
        "quality_dense": 0.9429,
        "quality_pruned": 0.9374,
        "metrics_dense": {"accuracy": 0.9429, "macro_f1": 0.9428},
        "metrics_pruned": {"accuracy": 0.9374, "macro_f1": 0.9372},
        "drop": interval(0.0055, 0.0017, 0.0093),
        "speedup": interval(2.72, 2.66, 2.79),
        "speedup_against": "openvino fp32 dense",
        "texts_per_second": {"dense": 371, "pruned": 1010},
        "parameters_dense": 855_770,
        "parameters_pruned": 431_010,
        "macs_dense": 125_485_706,
        "macs_pruned": 60_217_354,
        "channels": rows,
        "branches": [{"name": f"layers.{i}.conv1", "gone": i in gone} for i in range(27)],
        "whole": {"linear.weight": "the network's answer (output)"}
        | {f"gate.{i}.weight": f"a single channel (mul_{i})" for i in range(5)},
        "weights": "resnet56.safetensors",
        "normalization": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.201]},
        "picture": [32, 32],
        "timings": [
            {"batch": batch, "dense_ms": 2.9 * batch**0.95, "pruned_ms": 1.4 * batch**0.9} for batch in (1, 8, 64)
        ],
        "prediction": [{"round": 1, "what": "plan 1.8x", "predicted_ms": 1.61, "measured_ms": 1.66}],
        "recovery": [
            {"candidate": "pruned 1.8x", "step": 90 * i, "minutes": 0.7 * i, "distance": 0.17 + 0.5 * 0.8**i}
            for i in range(14)
        ],
        "data": {"calibration": 45000, "guardrail": 4000, "test": 5000, "notes": []},
        "command": "paredown prune networks:resnet56 --weights resnet56.safetensors --data cifar10 --max-drop 1%",
    }


def deep_pictures() -> dict[str, Any]:
    """A network of 300 groups with long names, of which branches are gone; nothing passed."""
    result = pictures()
    result["channels"] = [
        {
            "group": f"stages.{i // 60}.blocks.{i}.attention.conv{i % 3}",
            "channels": 2048,
            "kept": 0 if i % 7 == 3 else 1024 + i,
        }
        for i in range(300)
    ]
    for each in result["candidates"]:
        each["passed"] = False if each["passed"] else each["passed"]
    return {**result, "accepted": False, "verdict": ""}


ALL = {
    "accepted": accepted,
    "rejected": rejected,
    "unpruned": unpruned,
    "embedding": embedding,
    "language_model": language_model,
    "minimal": minimal,
    "crowded": crowded,
    "pictures": pictures,
    "deep_pictures": deep_pictures,
}


def hostile(text: str, name: str = "accepted") -> dict[str, Any]:
    """A run with `text` for every text and every key of an open mapping; words that choose a shape stay."""
    result = copy.deepcopy(ALL[name]())
    chosen_words = ("kind", "dial", "quality_metric", *(["task"] if name == "pictures" else []))

    def change(value: Any, key: str) -> Any:
        if isinstance(value, str):
            return value if key in chosen_words else text
        if isinstance(value, list):
            return [change(item, key) for item in value]
        if isinstance(value, dict):
            return {name: change(item, name) for name, item in value.items()}
        return value

    result = {key: change(value, key) for key, value in result.items()}
    for key in ("machine", "versions", "metrics_dense", "metrics_pruned"):
        result[key] = {text: "x" if key in ("machine", "versions") else 0.5}
    return result | {"whole": {text: text}} if "whole" in result else result


def _emptied(value: Any) -> Any:
    return [] if isinstance(value, list) else {} if isinstance(value, dict) else None
