"""The files around the package agree with each other."""

import re
import tomllib
from pathlib import Path

import yaml

from repro.files import repository_root

ROOT = repository_root()
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "sparse_dot_mkl": "sparse-dot-mkl"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_conda_environment_has_the_pinned_versions():
    """environment.yml installs exactly what constraints.txt pins, under conda-forge's names."""
    packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    for package in packages:
        name, version = package.split("=")
        if name != "python":
            assert pins()[CONDA_NAMES.get(name, name)] == version, name


def test_every_dependency_is_pinned_and_in_the_conda_environment():
    """A package added to pyproject.toml must be pinned, and the ones the package itself needs must reach conda users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = (ROOT / "environment.yml").read_text()
    back = {pip: name for name, pip in CONDA_NAMES.items()}
    for name in project["dependencies"]:
        assert name in pins()
        assert f"- {back.get(name, name)}=" in conda
    for extra in project["optional-dependencies"].values():
        assert {name.lower() for name in extra} <= set(pins())


def test_torch_of_the_makefile_is_the_pinned_one():
    """The Makefile installs torch first and by itself; both places must name one version."""
    (version,) = re.findall(r"torch==(\S+)", (ROOT / "Makefile").read_text())
    assert pins()["torch"] == version


def test_the_readme_runs(tmp_path, monkeypatch):
    """The lines that compile and save a pruned model are run as they stand, and do what they say."""
    import torch

    from repro.pruning import GradualPruner, HardPrune

    (lines,) = [
        block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "compile" in block
    ]
    torch.manual_seed(0)
    model = torch.nn.GRU(100, 200)
    GradualPruner(model, HardPrune(0.9, at=0)).step()
    x = torch.randn(5, 1, 100)
    expected = model(x)[0].detach()
    monkeypatch.chdir(tmp_path)
    scope = {"model": model}
    exec(lines, scope)
    assert [choice.runs for choice in scope["fast"].choices] == ["sparse"]
    assert torch.allclose(scope["fast"](x)[0], expected, atol=1e-5)
    assert (tmp_path / "pruned.safetensors").stat().st_size == scope["size"].file < scope["size"].dense / 5
    assert torch.allclose(model(x)[0], expected, atol=1e-3) and not torch.equal(model(x)[0], expected)  # float16 now


def test_versions_agree():
    """One version number in package, pyproject.toml and CITATION.cff."""
    import repro

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert repro.__version__ == project["version"] == citation["version"]


def test_no_path_or_host_of_a_workplace_is_tracked():
    """Nothing committed names a machine's own folders or a package registry's host."""
    forbidden = re.compile(r"/home/\w|/root/|/tmp/|pythonhosted|/simple/")
    for folder in ("repro", "notebooks", "data/papers", ".ci"):
        for path in filter(Path.is_file, (ROOT / folder).rglob("*")):
            if path.parent.name != "__pycache__":
                assert not forbidden.search(path.read_text(errors="ignore")), path
