"""The notebooks: thin, complete, without numbers of their own, and each of them runs under papermill in the smoke profile."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from filelock import FileLock

from repro.errors import ReproError
from repro.files import repository_root
from repro.notebook import open_exhibit
from repro.report.notebooks import execute, html_body
from repro.report.published import load_published
from repro.studies import STUDIES

FOLDER = repository_root() / "notebooks"
NAMES = [f"{study.name}/{exhibit}" for study in STUDIES.values() for exhibit in study.exhibits]
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.]*\w)")
DEFINITIONS = (
    ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    | ast.For | ast.AsyncFor | ast.While | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
)  # fmt: skip


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.ipynb"


def read(name: str):
    return nbformat.read(path_of(name), as_version=4)


def code(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook) -> str:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell.source


def literals(notebook) -> dict:
    """The parameters cell as papermill sees it: name -> value."""
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(parameters_cell(notebook)).body}


def significant(digits: str) -> int:
    """How many digits of a number mean something: 3 of 0.0125, 55,000 has two."""
    plain = digits.replace(",", "")
    kept = plain.replace(".", "").lstrip("0")
    return len(kept if "." in plain else kept.rstrip("0"))


def test_every_exhibit_has_a_notebook_and_every_notebook_an_exhibit():
    assert sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestAsCommitted:
    def test_it_is_valid_and_stripped(self, name):
        """A clean clone shows no result that its own machine has not made, and a rerun makes no difference to commit."""
        notebook = read(name)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"
        for cell in notebook.cells:
            assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)

    def test_its_parameters_are_commented_literals_that_the_exhibit_takes(self, name):
        """What the cell shows for all profiles alike must be what all of them have, or opening it would change the trials."""
        study, _, exhibit = name.partition("/")
        notebook = read(name)
        lines = parameters_cell(notebook).splitlines()
        assert all(re.fullmatch(r"\w+ = [^#]+  # \S.*", line) for line in lines)
        shown = literals(notebook)
        assert len(shown) == len(lines) and shown.pop("profile") == "laptop"
        assert set(shown) <= set(STUDIES[study].exhibits[exhibit].parameters)
        for profile in STUDIES[study].profiles.values():
            assert {key: getattr(profile, key) for key, value in shown.items() if value is not None} == {
                key: value for key, value in shown.items() if value is not None
            }

    def test_it_opens_its_own_exhibit_and_shows_all_of_it(self, name):
        source = "\n".join(code(read(name)))
        assert source.count("open_exhibit(") == 1 and f'open_exhibit("{name}", globals())' in source
        for shown in (".run()", ".figure()", ".tables()", ".verdicts()", ".provenance()"):
            assert shown in source, shown

    def test_it_defines_nothing_and_loops_nowhere(self, name):
        for source in code(read(name)):
            found = [type(node).__name__ for node in ast.walk(ast.parse(source)) if isinstance(node, DEFINITIONS)]
            assert found == [], source

    def test_no_number_of_the_paper_is_typed(self, name):
        """They come from data/papers, with how they are known. Fewer than three digits prove nothing, but percentages do."""
        rows = load_published(name.partition("/")[0])
        printed = {abs(value) for value in rows[rows["known"] != "derived"]["value"]}
        for cell in read(name).cells:
            typed = [number for number in NUMBER.findall(cell.source) if significant(number) >= 3]
            assert [number for number in typed if float(number.replace(",", "")) in printed] == [], cell.source
            assert not re.search(r"\d\s*\\?%", cell.source), cell.source


def test_the_search_for_typed_numbers_finds_them():
    """It would be worth nothing if it overlooked the ways a number can be written."""
    text = "12.88, of 67,000,000 and -20.71 (13.82). rnn1760, 0.9 and 3x are none"
    assert [number for number in NUMBER.findall(text) if significant(number) >= 3] == ["12.88", "20.71", "13.82"]
    assert significant("67,000,000") == 2 and significant("0.00125") == 3


# ------------------------------------------------------------------------------------------------------------- execution


@pytest.fixture(scope="session")
def smoke_results(tmp_path_factory, worker_id):
    """A results folder with every trial of the smoke profile, run once by whichever process of the tests comes first."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    folder = shared / "notebook-results"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            command = [sys.executable, "-m", "repro.cli", "run", "--profile", "smoke", "--no-notebooks", "--jobs", "2"]
            found = subprocess.run(command, env=os.environ | {"REPRO_RESULTS": str(folder)}, capture_output=True, text=True)
            assert found.returncode == 0, found.stderr
            (folder / "done").touch()
    return folder


@pytest.fixture
def smoke(smoke_results, monkeypatch):
    """The shared results, set for notebooks that this process starts."""
    monkeypatch.setenv("REPRO_RESULTS", str(smoke_results))
    monkeypatch.setenv("REPRO_JOBS", "1")
    return smoke_results


class Shown(NamedTuple):
    pictures: int
    html: str


def shown(notebook) -> Shown:
    """What the executed notebook's cells display."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.ename for output in outputs if output.output_type == "error"] == []
    data = [output.get("data", {}) for output in outputs]
    return Shown(sum("image/png" in d for d in data), "\n".join(d.get("text/html", "") for d in data))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_shows_figure_and_verdicts(name, smoke, tmp_path):
    """Papermill alone, from the parameters that `repro run` gives; and the report can make a page of it."""
    study, _, exhibit = name.partition("/")
    output = execute(path_of(name), tmp_path / "out.ipynb", {"profile": "smoke"})
    found = shown(nbformat.read(output, as_version=4))
    assert found.pictures == 1
    assert not re.search(">(miss|resumable)<", found.html), "the notebook asks for trials that `repro run` has not run"
    claims = [claim for claim in STUDIES[study].claims() if claim.exhibit == exhibit]
    assert all(re.search(rf">{claim.id}<", found.html) for claim in claims)
    assert "Traceback" not in html_body(output)
    for suffix in (".png", ".svg", ".csv"):
        assert (smoke / "local" / study / "smoke" / f"{exhibit}{suffix}").stat().st_size > 0


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"threshold": 0.1}, "unknown parameter threshold of narang2017/figure2: it takes profile, seeds, .*phi"),
        ({"sparsity": 0.3}, "parameter sparsity is 0.3: it should lie between 0.5 and 0.99"),
    ],
    ids=["unknown", "out of range"],
)
def test_a_wrong_parameter_stops_the_notebook(changes, complaint, tmp_path, monkeypatch):
    """Papermill only warns of unknown names; the notebook itself says what is allowed, and nothing is run or written."""
    monkeypatch.setenv("REPRO_RESULTS", str(tmp_path))
    with pytest.raises(ReproError, match=complaint):
        execute(path_of("narang2017/figure2"), tmp_path / "out.ipynb", {"profile": "smoke"} | changes)
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed.ipynb"]


@pytest.mark.timeout(900)
def test_a_changed_parameter_makes_other_trials_and_files(smoke, tmp_path):
    """A figure can never carry the records of other parameters: keys differ, and so does the folder the files lie in."""
    folder = smoke / "local" / "narang2017"
    output = execute(path_of("narang2017/figure2"), tmp_path / "out.ipynb", {"profile": "smoke", "phi": 2.0})
    written = sorted(path.name for path in (folder / "smoke_phi=2").iterdir())
    assert written == ["figure2-2.csv", "figure2.csv", "figure2.png", "figure2.svg"]
    keys = figure2_keys(phi=2.0)
    assert keys.isdisjoint(figure2_keys())
    html = shown(nbformat.read(output, as_version=4)).html
    assert all(key[:12] in html for key in keys) and not any(key[:12] in html for key in figure2_keys())
    for key in keys:
        assert json.loads((folder / "records" / f"{key}.json").read_text())["spec"]["pruning"]["phi"] == 2.0


def figure2_keys(**changes) -> set[str]:
    study = STUDIES["narang2017"]
    (arm,) = study.exhibits["figure2"].arms(study.profile("smoke", **changes)).values()
    return {trial.key() for trial in arm}


# --------------------------------------------------------------------------------------------------------- open_exhibit


@pytest.mark.parametrize(
    "given, complaint",
    [
        ({"seeds": 2.5}, "parameter seeds is 2.5: it should be of type int"),
        ({"seeds": "3"}, "parameter seeds is '3': it should be of type int"),
        ({"seeds": 0}, "parameter seeds is 0: it should lie between 1 and 100"),
        ({"profile": "huge"}, "smoke, laptop, paper"),
        ({"profile": 1}, "parameter profile is 1: it should be one of smoke, laptop, paper"),
        ({"sparsity": len}, "parameter sparsity is <built-in function len>: it should be of type float"),
    ],
    ids=str,
)
def test_ill_typed_values_are_errors_that_say_what_is_right(given, complaint):
    """The last as after `from repro.pruning import sparsity`, which would otherwise silently undo `papermill -p sparsity`."""
    with pytest.raises(ReproError, match=complaint):
        open_exhibit("narang2017/table3", {"profile": "smoke"} | given)


def test_results_of_examples_are_no_parameters():
    """Models, arrays, modules and named tuples may stay around; None leaves a parameter as the profile has it."""

    class Pair(NamedTuple):
        left: int

    around = {"phi": None, "pair": Pair(1), "json": json, "_hidden": 3}
    opened = open_exhibit("narang2017/figure2", {"profile": "smoke"} | around)
    assert {trial.key() for trial in opened._run.trials} == figure2_keys()
