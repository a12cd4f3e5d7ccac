"""Writes the tables of measured results into README.md and docs, from the latest records in results.jsonl."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cnn_criteria

HERE = Path(__file__).parent
NAMES = {
    "banking77": "MiniLM-L6 classifier, BANKING77, `--max-drop 1% --minutes 20`",
    "banking77-untrained": "the same, `--minutes 0`",
    "banking77-twice": "the same, `--speedup 2 --minutes 2`",
    "amounts": "the same, `--heads 25% --neurons 25% --layers 1 --minutes 15`",
    "newsgroups": "all-MiniLM-L6-v2 as an embedder, 20 newsgroups, `--max-drop 2% --minutes 5`",
}


def records() -> list[dict[str, Any]]:
    """Everything that was recorded, oldest first."""
    lines = (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def run_of(benchmark: str) -> list[dict[str, Any]]:
    """Of each step of a benchmark, the records at the commit that recorded it last; 3 is a gate's no, with figures."""
    own = [record for record in records() if record["benchmark"] == benchmark and record["exit_code"] in (0, 3)]
    last = {record["step"]: record["commit"] for record in own}
    return [record for record in own if record["commit"] == last[record["step"]]]


def merged(benchmark: str) -> list[dict[str, Any]]:
    """The rows of all records of a comparison, the last word on each criterion and share."""
    found: dict[tuple[str, str, float], dict[str, Any]] = {}
    for record in records():
        if record["benchmark"] == benchmark and record["exit_code"] == 0:
            found |= {(row["unit"], row["criterion"], row["fraction"]): row for row in record["rows"]}
    return list(found.values())


def latest() -> dict[str, list[dict[str, Any]]]:
    """Of every benchmark the last record of step "prune", and the validations that followed it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records():
        if record["step"] == "prune":
            found[record["benchmark"]] = []
        if "speedup" in record and record["benchmark"] in found:  # else it ended in an error
            found[record["benchmark"]].append(record)
    return {name: records for name, records in found.items() if records}


def speed_of(record: dict[str, Any]) -> str:
    speed = record["speedup"]
    against = record["speedup_against"].split("/")[-1]  # a validation names the model's folder too
    return f"**{speed['value']:.2f}x** [{speed['low']:.2f}, {speed['high']:.2f}] against {against}"


def quality_of(record: dict[str, Any]) -> tuple[str, str]:
    drop = record["drop"]
    percent = record["quality_metric"] == "accuracy"
    scale, digits = (100, 2) if percent else (1, 4)
    before, after = record["quality_dense"] * scale, record["quality_pruned"] * scale
    value, low, high = (drop[key] * scale for key in ("value", "low", "high"))
    return (
        f"{record['quality_metric']} {before:.{digits}f} to {after:.{digits}f}",
        f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{' points' if percent else ''}",
    )


def lines_of(cells: Sequence[Sequence[str]]) -> list[str]:
    head, *rows = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + " --- |" * len(cells[0]), *rows]


def results() -> str:
    """Pruning runs and their validations."""
    made_by = {name: latest()[name] for name in NAMES if name in latest()}
    runs = [("job", "the tool's answer", "texts per second", "one text, p50", "on the test split", "drop", "accepted")]
    checks = [("proved again", "texts per second", "one text, p50", "on the whole file", "drop", "holds")]
    for name, (made, *validations) in made_by.items():
        p50 = "{dense:.2f} to {pruned:.2f} ms".format_map
        runs.append(
            (NAMES[name], made["candidate"], speed_of(made), p50(made["latency_ms_p50"]), *quality_of(made), yes(made))
        )
        checks += [
            (f"{name}: {one['step']}", speed_of(one), p50(one["latency_ms_p50"]), *quality_of(one), yes(one))
            for one in validations
        ]
    lines = lines_of(runs) + (["", *lines_of(checks)] if checks[1:] else [])
    cards = {
        (r["machine"]["cpu"], r["machine"]["cores"], tuple(r["machine"]["flags"]))
        for rs in made_by.values()
        for r in rs
    }
    for cpu, cores, flags in sorted(cards):
        lines += ["", f"Measured on {cpu}, {cores} cores ({', '.join(flags)}); intervals at 95 %."]
    return "\n".join(lines)


def yes(record: dict[str, Any]) -> str:
    return "yes" if record["accepted"] else "no"


def criteria() -> str:
    """Points of accuracy lost by criterion, bare and re-fitted, and what scoring costs."""
    bare, fitted = (merged(name) for name in ("criteria", "criteria-refitted"))
    cost = run_of("scoring")[-1]
    passes = {row["criterion"]: row for row in cost["rows"]}
    parts = []
    for unit in ("heads", "neurons"):
        lost = {name: _rows({"rows": rows}, unit) for name, rows in (("", bare), (" re-fitted", fitted))}
        columns = [(kind, share) for kind, rows in lost.items() for share in sorted({share for _, share in rows})]
        names = sorted({name for name, _ in lost[""]}, key=lambda name: (lost[""][name, 0.3]["drop"]["value"], name))
        head = [unit, *(f"{share:.0%}{kind}" for kind, share in columns), "forward passes", "forward + backward"]
        table = [head]
        for name in names:
            cells = [_drop(lost[kind].get((name, share))) for kind, share in columns]
            own = passes[name]
            spent = (
                ["", f"{own['forward_backward_passes']:.1f}"]
                if own["gradients"]
                else [f"{own['forward_passes']:.1f}", ""]
            )
            table.append([f"`{name}`", *cells, *spent])
        parts += [*lines_of(table), ""]
    memory = ", ".join(f"{mib:,} MiB for {int(texts):,}" for texts, mib in cost["peak_memory_mib_by_texts"].items())
    return "\n".join([*parts, f"Peak memory of a process that scores by four criteria, by texts: {memory}."])


def decoders() -> str:
    """Perplexity by criterion: published ones bare, ours and FLAP as they come."""
    compared = [r for r in records() if r["benchmark"] == "decoder" and r["step"] == "compare"]  # the last word wins
    compared = [r for r in compared if r["recover"] != "compensate"]  # FLAP's bias is put in anyway
    parts = []
    for unit in ("neurons", "heads", "layers"):
        found: dict[str, dict[float, float]] = {}
        for record in compared:
            for (name, share), row in _rows(record, unit).items():
                said = f"`{name}`" + (", re-fitted (ours)" if record["recover"] == "reconstruct" else "")
                found.setdefault(said, {})[share] = math.exp(-row["quality"])
        shares = sorted({share for row in found.values() for share in row})
        title = "1 layer of 5" if unit == "layers" else None
        table = [[unit, *(title or f"{share:.0%}" for share in shares)]]
        for name, row in sorted(found.items(), key=lambda item: item[1][shares[-1]]):
            table.append([name, *(f"{row[share]:.3f}" for share in shares)])
        parts += [*lines_of(table), ""]
    dense = math.exp(-compared[0]["quality_dense"])
    return "\n".join([*parts, f"Dense: {dense:.3f}, on {compared[0]['samples']} guardrail texts."])


def rounds() -> str:
    """At once and in rounds, to the same size with as many steps."""
    table = [["rounds", "steps in all", "parameters", "on the test split", "drop"]]
    for record in run_of("rounds"):
        count = len(record["pruning_rounds"])
        table.append([str(count), "240", f"{record['parameters_pruned'] / 1e6:.1f} M", *quality_of(record)])
    return "\n".join(lines_of(table))


TOLD = {  # of a step's first word
    "sweep": "policies",
    "policy": "the policy chosen on newsgroups",
    "half": "half of the tokens, on all guardrail texts",
    "merge": "merging",
}


def tokens() -> str:
    """What dropping tokens gains and loses, by policy and by scorer; one threshold for several tasks; unpadding."""
    made = {record["step"]: record for name in ("tokens", "tokens-half", "tokens-scorers") for record in run_of(name)}
    parts = []
    for step, record in made.items():
        name, _, what = step.partition(" ")
        data, _, target = what.removeprefix("on ").partition(" ")
        told = TOLD.get(name, name)
        model = "MiniLM-L6 classifier" if record["task"] == "text-classification" else "all-MiniLM-L6-v2"
        parts += [
            f"**{told}, {data}, {target or record['target']}** ({model}, {record['mean_tokens']:.0f} tokens a text, "
            f"{'the chosen one on ' if record['accepted'] else ''}{record['samples']} texts):",
            "",
            *lines_of(_policies(record)),
            "",
        ]
    table = [["data", "batches of 64", "padding", "unpadded, times as fast", "largest difference"]]
    for row in (row for record in run_of("tokens-unpadding") for row in record["rows"]):
        speed = row["speedup"]
        times = f"{speed['value']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]"
        table.append([row["data"], row["order"], f"{row['padding']:.0%}", times, f"{row['largest_difference']:.0e}"])
    return "\n".join([*parts, "**Unpadding alone**, torch:", "", *lines_of(table)])


def _policies(record: dict[str, Any]) -> list[list[str]]:
    """Rows of policies; one that was not judged on all texts stands beside the dense model's figure on those it was."""
    metric = record["quality_metric"]
    table = [["policy", "times as fast [95 %]", f"dense {metric}", metric, "lost [95 %]"]]
    for row in record["candidates"]:
        if row["name"] == "dense":
            continue
        speed, drop = row["speedup"], row["drop"]
        times = f"{speed['value']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]"
        lost = f"{100 * drop['value']:.2f} [{100 * drop['low']:.2f}, {100 * drop['high']:.2f}]" if drop else ""
        quality = (
            [f"{100 * (row['quality'] + drop['value']):.2f} %", f"{100 * row['quality']:.2f} %"] if drop else ["", ""]
        )
        table.append([f"**{row['name']}**" if row["chosen"] else row["name"], times, *quality, lost])
    return table


def searched() -> str:
    """One (s, q, l) for several tasks, by scorer, with the published one beside it."""
    head = ["scorer", "s, q, l", "task", "tokens a text", "longer than s", "points lost [95 %]", "their time, of dense"]
    table, unsaid = [head], {"mean_tokens": None, "longer_than_s": None}
    for record in run_of("tokens-search"):
        for row in record["tasks"]:
            table.append(_line(record["scorer"], record["chosen"], row["task"], row, row))
            if "published" in row:
                table.append(_line("published", record["published"], row["task"], unsaid, row["published"]))
        for row in record["left_out"]:
            if row["policy"]:
                table.append(_line(f"{record['scorer']}, by the others", row["policy"], row["task"], unsaid, row))
    return "\n".join(lines_of(table))


def _line(name: str, triple: dict[str, Any], task: str, about: dict[str, Any], found: dict[str, Any]) -> list[str]:
    time, drop = found.get("time"), found["drop"]
    return [
        name,
        f"{triple['s']}, {triple['q']:g}, {triple['l']}",
        task,
        "" if about["mean_tokens"] is None else f"{about['mean_tokens']:.0f}",
        "" if about["longer_than_s"] is None else f"{about['longer_than_s']:.0%}",
        f"{100 * drop['value']:.2f} [{100 * drop['low']:.2f}, {100 * drop['high']:.2f}]",
        f"{time['value']:.0%} [{time['low']:.0%}, {time['high']:.0%}]" if time else "",
    ]


def sparse_products() -> str:
    """Times torch's dense product, by matrix, engine and sparsity, with all vectors of the CPU and held to AVX2."""
    parts = []
    for record in run_of("sparse-products"):
        shares = sorted({row["sparsity"] for row in record["rows"]})
        table = [["matrix", "engine", *(f"{share:.0%}" for share in shares)]]
        found: dict[tuple[str, str], dict[float, str]] = {}
        for row in record["rows"]:
            speed, name = row["speedup"], (f"{row['inputs']} to {row['outputs']}", row["engine"])
            said = f"{speed['value']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}]"
            if row["engine"] == "torch dense":
                said = f"{row['gflops']:.0f} GFLOP/s"
            found.setdefault(name, {})[row["sparsity"]] = said
        table += [[*name, *(cells[share] for share in shares)] for name, cells in found.items()]
        about = f"{record['level']} kernels, {record['tokens']} tokens, {record['threads']} threads"
        parts += [f"{about}, measured peak {record['peak_gflops']:.0f} GFLOP/s:", "", *lines_of(table), ""]
    return "\n".join(parts).rstrip()


def sparse_encoder() -> str:
    """Milliseconds of a batch by engine, and times dense ONNX Runtime."""
    record = run_of("sparse-encoder")[-1]
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in record["rows"]))
    table = [["engine", *(f"{batch} x {length} tokens" for batch, length in shapes)]]
    found: dict[str, list[str]] = {}
    for row in record["rows"]:
        speed = row["speedup"]
        said = f"{row['milliseconds']:.3g} ms, {speed['value']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}]"
        found.setdefault(row["engine"], []).append(said)
    return "\n".join(lines_of([*table, *([name, *cells] for name, cells in found.items())]))


def sparse_accuracy(benchmark: str) -> str:
    """Accuracy by how the zeros came about and by share."""
    rows = run_of(benchmark)
    if not rows:
        return ""
    shares = sorted({row["sparsity"] for row in rows})
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        name = f"`{row['solver']}`" + ("" if row["pattern"] == "unstructured" else f", {row['pattern']}")
        name += "" if row["allocation"] == "uniform" else f", {row['allocation']}"
        name += ", permuted" if row.get("permute") else ""
        name += f", {row['rounds']} rounds, {row['schedule']}" if row["rounds"] > 1 else ""
        name += f", {row['minutes']:g} minutes" if row["minutes"] else ""
        found.setdefault(name, {})[row["sparsity"]] = row["accuracy"]
    table = [["zeros", *(f"{share:.0%}" for share in shares)]]
    table.append(["dense", *[f"{100 * rows[0]['dense']:.2f}"] * len(shares)])
    for name, cells in found.items():
        table.append([name, *(f"{100 * cells[share]:.2f}" if share in cells else "" for share in shares)])
    return "\n".join(lines_of(table))


def sparse_perplexity() -> str:
    """Perplexity by solver and pattern."""
    record = run_of("sparse-perplexity")[-1]
    kinds = list(dict.fromkeys((row["pattern"], row["sparsity"]) for row in record["rows"]))
    table = [["solver", *(name if name != "unstructured" else f"{share:.0%}" for name, share in kinds)]]
    table.append(["dense", *[f"{record['dense']:.3f}"] * len(kinds)])
    found: dict[str, list[str]] = {}
    for row in record["rows"]:
        found.setdefault(f"`{row['solver']}`", []).append(f"{row['perplexity']:.3f}")
    return "\n".join(lines_of([*table, *([name, *cells] for name, cells in found.items())]))


def image_classifiers(benchmark: str) -> str:
    """All candidates of the main job on pictures, by network."""
    parts = []
    own = [record for record in records() if record["benchmark"] == benchmark and "candidates" in record]
    for name, record in {record["model"].split(":")[-1]: record for record in own}.items():
        rows = record["candidates"]
        base = next(row for row in rows if row["name"] == "onnxruntime dense")["texts_per_second"]
        head = ["", "parameters", "accuracy, guardrail", "points lost [95 %]", "times dense ONNX Runtime"]
        table = [[*head, f"times {record['speedup_against']} [95 %]"]]
        for row in sorted(rows, key=lambda row: row["texts_per_second"]):
            drop = row["drop"]
            lost = f"{100 * drop['value']:.2f} [{100 * drop['low']:.2f}, {100 * drop['high']:.2f}]"
            named = f"**{row['name']}**" if row["chosen"] else row["name"]
            cells = [named, f"{row['parameters']:,}", f"{100 * row['quality']:.2f}", lost]
            table.append([*cells, f"{row['texts_per_second'] / base:.2f}", _times(row["speedup"])])
        told = f"**{name}**, {record['minutes']:.0f} minutes in all. {record['verdict']}"
        parts += [told, "", *lines_of(table), ""]
    return "\n".join(parts).rstrip()


def _points(found: Mapping[str, float] | None) -> str:
    """Of accuracy, with their interval."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*(100 * found[key] for key in ("value", "low", "high"))) if found else ""


def beside_torch_pruning() -> str:
    """Accuracy and speed of both tools at equal multiply-accumulates, by network and by what may be cut."""
    found = {record["step"]: record for record in run_of("cnn-torch-pruning")}  # the last word wins
    parts = []
    for record in found.values():
        rows, trained = record["rows"], record["steps"] > 0
        led = any("led" in row for row in rows)
        head = ["cut by", "MACs", "right after", *["trained"] * trained, "lead [95 %]", *["led", "lead [95 %]"] * led]
        table = [[*head, "64 pictures, ms", "times dense", "ahead", "1 picture, ms", "times dense", "ahead"]]
        for row in rows:
            after = " / ".join(f"{100 * row[key]:.2f}" for key in ("cut", "refitted") if key in row)
            name = f"{row['tool']}, {row['scope']}" if row["scope"] else f"(dense: {100 * row['trained']:.2f})"
            name += f", {row['ranking']}" if row["tool"] == "torch-pruning" else ""
            step = math.gcd(*row["channels"])
            name += f", streams {row['streams']}" if row["scope"] == "all" and "streams" in row else ""
            name += f", multiples of {step}" if row["scope"] and step > 1 else ""
            learnt = [f"{100 * row['trained']:.2f}" if row["scope"] else ""] if trained else []
            cells = [name, f"{row['macs'] / rows[0]['macs']:.3f}", after, *learnt]
            cells.append(_points(row.get("lead") or row.get("untrained_lead")))
            cells += [f"{100 * row['led']:.2f}" if "led" in row else "", _points(row.get("led_lead"))] if led else []
            for which, spent in (("", "batch_64_ms"), ("single_", "single_ms")):
                cells += [f"{row[spent]:.3g}", *(_times(row.get(which + key)) for key in ("speedup", "ahead"))]
            table.append(cells)
        title = f"{record['network']}, {record['share']:g} of the multiply-accumulates, {record['criterion']}"
        title += f", {record['steps']} steps of training" if trained else ", no training"
        parts += [f"**{title}**, {record['pictures']:,} test pictures:", "", *lines_of(table), ""]
    return "\n".join(parts).rstrip()


def compared_channels() -> str:
    """Criteria for channels by what follows the cut; their plots are written too."""
    return cnn_criteria.text(run_of("cnn-criteria"), HERE.parent / "docs", lines_of)


PARTS = ("dense", "pruned")


def convolution() -> str:
    """One convolution and its half on every engine."""
    found = run_of("cnn-convolution")
    if not found:
        return ""
    table = [["engine", "batch", "dense", "half of the outputs", "times as fast [95 %]", "of two", "does not shrink"]]
    for row in found[-1]["rows"]:
        said = "{ms:.3g} ms, {gflops:.0f} GFLOP/s, {of_peak:.0%} of the peak".format_map
        both = [said({key: row[f"{which}_{key}"] for key in ("ms", "gflops", "of_peak")}) for which in PARTS]
        fixed = f"{row['fixed_ms']:.2g} ms"
        table.append(
            [row["engine"], str(row["batch"]), *both, _times(row["speedup"]), f"{row['of_theory']:.0%}", fixed]
        )
    return "\n".join([*lines_of(table), "", f"Measured peak: {found[-1]['peak_gflops']:.0f} GFLOP/s."])


def _times(speed: dict[str, float] | None) -> str:
    return f"{speed['value']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]" if speed else ""


def _rows(record: dict[str, Any], unit: str) -> dict[tuple[str, float], dict[str, Any]]:
    return {(row["criterion"], row["fraction"]): row for row in record["rows"] if row["unit"] == unit}


def _drop(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    value, low, high = (100 * row["drop"][key] for key in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


PLACES = {  # which table goes where
    "results": ("README.md", results),
    "criteria": ("docs/criteria.md", criteria),
    "decoders": ("docs/amounts.md", decoders),
    "rounds": ("docs/amounts.md", rounds),
    "tokens": ("docs/tokens.md", tokens),
    "searched": ("docs/tokens.md", searched),
    "sparse-products": ("docs/sparsity.md", sparse_products),
    "sparse-encoder": ("docs/sparsity.md", sparse_encoder),
    "sparse-curve": ("docs/sparsity.md", lambda: sparse_accuracy("sparse-curve")),
    "sparse-recovered": ("docs/sparsity.md", lambda: sparse_accuracy("sparse-recovered")),
    "sparse-perplexity": ("docs/sparsity.md", sparse_perplexity),
    "cnn-untrained": ("docs/networks.md", lambda: image_classifiers("cnn-untrained")),
    "cnn-trained": ("docs/networks.md", lambda: image_classifiers("cnn-trained")),
    "cnn-int8": ("docs/networks.md", lambda: image_classifiers("cnn-int8")),
    "cnn-drop": ("docs/networks.md", lambda: image_classifiers("cnn-drop")),
    "cnn-torch-pruning": ("docs/networks.md", beside_torch_pruning),
    "cnn-convolution": ("docs/networks.md", convolution),
    "cnn-criteria": ("docs/networks.md", compared_channels),
}


def main() -> int:
    for name, (place, made) in PLACES.items():
        path = HERE.parent / place
        text = path.read_text(encoding="utf-8")
        start, end = f"<!-- {name}: made by benchmarks/table.py -->", f"<!-- end of {name} -->"
        if start not in text or end not in text:
            raise SystemExit(f"{place} has no place for the table {name}")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        path.write_text(f"{before}{start}\n{made()}\n{end}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
