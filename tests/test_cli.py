"""The command line: what it prints, and one clear sentence with a non-zero exit for everything a user can get wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from repro.cli import main
from repro.files import repository_root
from repro.studies import STUDIES

SMALL = ("-p", "seeds", "1", "-p", "rnn_scale", "110")  # one tiny trial


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder of the test's own; the made corpus is cached beside the checkout as always."""
    monkeypatch.setenv("REPRO_RESULTS", str(tmp_path))
    return tmp_path


def sentence(capsys, *arguments) -> str:
    """What a failing call prints last, from the program's name on; no traceback."""
    assert main(list(arguments)) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text[text.index("repro: ") :]


def test_list_names_every_exhibit(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for study in STUDIES.values():
        assert all(f"{study.name}/{name}" in text for name in study.exhibits)


def test_plan_counts_trials_and_shared_ones_once(results, capsys):
    """Figure 2 and the memory exhibit use the same trials; planning both asks for them once, with the dense ones they need."""
    assert main(["plan", "narang2017/figure2", "narang2017/memory", "--profile", "laptop"]) == 0
    text = capsys.readouterr().out
    assert "6 trials: 0 recorded, 6 to run" in text


def test_run_then_plan_finds_the_records(results, capsys):
    """A second run trains nothing; the key does not depend on the process that asked."""
    arguments = ["narang2017/figure2", "--profile", "smoke", *SMALL]
    assert main(["run", *arguments, "--no-notebooks", "--jobs", "1"]) == 0
    written = sorted((results / "local" / "narang2017" / "records").glob("*.json"))
    before = [path.stat().st_mtime_ns for path in written]
    assert len(written) == 2  # the pruned trial and the dense one it takes q from
    assert main(["run", *arguments, "--no-notebooks", "--jobs", "1"]) == 0
    assert [path.stat().st_mtime_ns for path in written] == before
    capsys.readouterr()
    assert main(["plan", *arguments]) == 0
    assert "1 recorded, 0 to run" in capsys.readouterr().out


def test_same_spec_gives_the_same_bytes_twice(results, tmp_path, monkeypatch):
    """Two runs in two stores: metrics and curves are equal to the last digit (times apart)."""
    found = []
    for name in ("one", "two"):
        monkeypatch.setenv("REPRO_RESULTS", str(tmp_path / name))
        assert main(["run", "narang2017/figure2", "--profile", "smoke", *SMALL, "--no-notebooks", "--jobs", "2"]) == 0
        records = {}
        for path in (tmp_path / name).rglob("records/*.json"):
            record = json.loads(path.read_text())
            record["metrics"].pop("epoch_seconds")
            record["curves"]["epochs"].pop("seconds")
            records[path.name] = (record["metrics"], record["curves"])
        found.append(records)
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_unknown_names_list_what_is_there(results, capsys):
    assert "smoke, laptop, paper" in sentence(capsys, "plan", "--profile", "laptoq")
    assert "narang2017" in sentence(capsys, "plan", "zhang2017/table1")
    assert "table3" in sentence(capsys, "run", "narang2017/table7")
    assert "sparsity" in sentence(capsys, "run", "narang2017/figure2", "-p", "sparcity", "0.8")
    assert "--address" in sentence(capsys, "run", "--executor", "dask")


def test_values_out_of_range_or_of_the_wrong_type(results, capsys):
    assert "between 0.5 and 0.99" in sentence(capsys, "run", "narang2017/figure2", "-p", "sparsity", "1.5")
    assert "type int" in sentence(capsys, "run", "narang2017/figure2", "-p", "seeds", "many")
    for command in ("run", "plan"):
        for jobs in ("0", "-2", "two"):
            with pytest.raises(SystemExit):
                main([command, "narang2017/figure2", "--jobs", jobs])
            assert "it must be at least 1" in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_ends_it_quietly():
    found = subprocess.run(f"{sys.executable} -m repro.cli list | head -1", shell=True, capture_output=True, text=True)
    assert found.stdout.startswith("narang2017") and found.stderr == ""


def test_missing_corpus_says_how_to_get_it(results, capsys, monkeypatch):
    """The paper profile without AN4: one sentence with the command that mends it; nothing is stored."""
    monkeypatch.delenv("REPRO_DATA_MIRROR", raising=False)
    monkeypatch.setenv("REPRO_DATA_CACHE", str(results / "empty"))
    text = sentence(capsys, "run", "narang2017/figure2", "--profile", "paper", "-p", "seeds", "1", "--no-notebooks")
    assert "make data" in text
    assert not list(results.rglob("records/*.json"))


def test_report_before_anything_was_run(results, capsys):
    assert "make reproduce" in sentence(capsys, "report", "--profile", "smoke")


def test_wrong_mirror_is_named(results, capsys, monkeypatch):
    monkeypatch.setenv("REPRO_DATA_CACHE", str(results / "cache"))
    assert str(results) in sentence(capsys, "data", "an4", "--from", str(results))


def test_doctor_prints_versions_and_corpora(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "an4" in text and "made" in text


def test_looking_does_not_load_torch():
    """`repro list` answers at once: torch is loaded by trials alone."""
    code = (
        "import sys; from repro.cli import main; status = main(['list']); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_console_script_is_installed():
    assert (Path(sys.executable).parent / "repro").exists()
    assert repository_root().joinpath("Makefile").exists()
