"""The house has two storeys: who may import whom, read from the source and tried in a fresh interpreter."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import repro

PACKAGE = Path(repro.__file__).parent
UPSTAIRS = {"studies", "engine", "report", "results", "cli", "notebook", "__main__"}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute names a module imports, wherever the statement stands; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") + [""] * is_package
                base = ".".join(filter(None, [*parts[: -node.level], base]))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, set[str]]:
    """Every module of the package and what it imports."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found[name] = imports(path.read_text(encoding="utf-8"), name, is_package)
    return found


def unit(name: str) -> str | None:
    """The part of the house a dotted name belongs to: `repro.engine.store` is in "engine"."""
    parts = name.split(".")
    return parts[1] if parts[0] == "repro" and len(parts) > 1 else None


MODULES = modules()
UNITS = {unit(name) for name in MODULES} - {None}


def used(name: str) -> set[str]:
    """Parts of the house that the module imports from, its own aside."""
    return ({unit(imported) for imported in MODULES[name]} & UNITS) - {unit(name)}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import repro.engine.store", "repro.engine.store"),
        ("from repro.engine import Trial", "repro.engine"),
        ("from repro import engine", "repro.engine"),
        ("def f():\n    from repro.engine.store import Store", "repro.engine.store"),
        ("if TYPE_CHECKING:\n    import repro.engine", "repro.engine"),
        ("from ..engine import store", "repro.engine.store"),
        ("from .. import engine", "repro.engine"),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    """The rules below are worth what this reading of the source is worth."""
    assert expected in imports(source, "repro.models.speech")


def test_relative_imports_of_packages_are_resolved():
    assert "repro.models.ctc" in imports("from . import ctc", "repro.models", is_package=True)
    assert "repro.engine" in imports("from .. import engine", "repro.models", is_package=True)


def test_the_whole_house_is_read():
    """The rules are not held over an empty list."""
    assert {"engine", "report", "studies", "datasets", "models", "pruning", "sparse", "training", "errors", "files"} <= UNITS
    assert used("repro.pruning.pruner") == {"errors"}
    assert {"engine", "models", "pruning", "training", "datasets"} <= used("repro.studies.speech")


def test_nothing_downstairs_imports_upstairs():
    """Pruning, models, datasets, kernels and whatever joins them can be used without the study."""
    for name in MODULES:
        if unit(name) not in UPSTAIRS:
            assert not used(name) & UPSTAIRS, name


def test_engine_and_report_keep_apart():
    """The engine knows no papers and draws nothing; the report takes tables, not trials."""
    for name in MODULES:
        if unit(name) == "engine":
            assert not used(name) & (UPSTAIRS - {"engine"}), name
        if unit(name) == "report":
            assert not used(name) & (UPSTAIRS - {"report"}), name


def test_no_circles():
    """The parts of the house can be put in an order in which each imports earlier ones only."""
    graph = {part: set() for part in UNITS}
    for name in MODULES:
        if unit(name):
            graph[unit(name)] |= used(name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(f"circular imports: {' -> '.join(circle.args[1])}")


def test_nothing_imports_notebooks():
    """Notebooks import repro, never the reverse."""
    for name, imported in MODULES.items():
        assert not any(other.split(".")[0] == "notebooks" for other in imported), name


def test_engine_and_report_load_without_torch():
    """Every module of both, in a fresh interpreter: records are listed and figures drawn where torch is slow or absent."""
    wanted = [name for name in MODULES if unit(name) in {"engine", "report"}]
    assert len(wanted) > 10
    code = f"""
import importlib, sys
for name in {wanted!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
