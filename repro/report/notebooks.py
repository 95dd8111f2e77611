"""Notebooks are executed, and turned into HTML that needs neither scripts nor the network."""

import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from repro.errors import ReproError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def execute(notebook: Path, output: Path, parameters: dict) -> Path:
    """Run `notebook` with papermill, whose kernel is a process of its own; store the executed copy as `output` and return that.

    `output` appears only when every cell has run. After a failing cell the notebook up to it lies beside it as
    `<name>.failed.ipynb`, and a ReproError names the notebook, the cell and the error's last line.
    """
    notebook, output = Path(notebook), Path(output)
    if not notebook.is_file():
        raise ReproError(f"no notebook {notebook}: run from a clone of the repository, or give a path that exists")
    partial = output.with_name(f".{output.stem}.{os.getpid()}.partial.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        complaint = _run(notebook, partial, parameters)
        if complaint is None:
            os.replace(partial, output)
            failed.unlink(missing_ok=True)
            return output
        if partial.exists():
            os.replace(partial, failed)
    except OSError as error:
        raise ReproError(f"cannot write {output}: {error.strerror}; free space or choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)
    raise ReproError(f"{notebook} {complaint}" + (f" (see {failed})" if failed.exists() else ""))


def _run(notebook: Path, output: Path, parameters: dict) -> str | None:
    """What is wrong, if anything. Called from Python: papermill's command line reads YAML 1.1, where 1e-06 is a text."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            str(notebook), str(output), parameters, kernel_name="python3", language="python", progress_bar=False
        )
    except PapermillExecutionError as error:
        return f"failed in cell [{error.exec_count}]: {_last_line(f'{error.ename}: {error.evalue}')}"
    except OSError:
        raise
    except Exception as error:  # of a kernel that died, of a file that is no notebook
        return f"could not be run: {_last_line(f'{type(error).__name__}: {error}')}"
    return None


def _last_line(message: str) -> str:
    return _COLOUR.sub("", message).strip().splitlines()[-1]


def execute_all(tasks: Iterable[tuple[Path, Path, dict]], jobs: int = 1, progress: Callable[[str], None] = print) -> list[Path]:
    """`execute` each (notebook, output, parameters), `jobs` at a time; returns the outputs in the order of `tasks`.

    progress receives one line of text per finished notebook. A failing notebook does not stop the others, a killed process
    does; afterwards one ReproError names every one that failed.
    """
    tasks = list(tasks)
    began = time.monotonic()
    failures = {}
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _silence)
    try:
        numbers = {pool.submit(execute, *task): number for number, task in enumerate(tasks)}
        for done, future in enumerate(as_completed(numbers), start=1):
            number = numbers[future]
            word = "done"
            try:
                future.result()
            except (ReproError, BrokenProcessPool) as error:
                killed = f"{tasks[number][0]} was not run to its end: a process that runs notebooks was killed"
                failures[number] = str(error) if isinstance(error, ReproError) else killed
                word = "FAILED"
            progress(f"[{done}/{len(tasks)}] {word} {tasks[number][0]} after {time.monotonic() - began:.0f} s")
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C no further notebook is begun
    if failures:
        raise ReproError("; ".join(failures[number] for number in sorted(failures)))
    return [Path(output) for _, output, _ in tasks]


def _silence() -> None:
    """What kernels say besides the outputs of cells: notes on debuggers and transports."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


# Code is matched first and kept; an opening dollar touches what follows, a closing one what precedes (pandoc's rule), so
# that "$5 and $6" stays text.
_CODE_OR_MATH = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|(?P<tick>`+)(?!`).*?(?<!`)(?P=tick)(?!`))"
    r"|\$\$(?P<block>.+?)\$\$"
    r"|\$(?P<inline>[^\s$`](?:[^$\n`]*[^\s$\\`])?)\$(?!\d)"
    r"|(?P<dollar>\\?\$)",
    re.DOTALL | re.MULTILINE,
)


def html_body(notebook: Path) -> str:
    """The executed `notebook` as a fragment of HTML: formulas as MathML, no scripts, tables in boxes that scroll.

    Raises ReproError when the file is no notebook or a formula cannot be translated.
    """
    import nbformat
    from nbconvert import HTMLExporter

    try:
        content = nbformat.read(notebook, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ReproError(f"{notebook} is no readable notebook: {error}") from error
    formulas: list[str] = []
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = _set_formulas_aside(cell.source, formulas, notebook)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in {"text/markdown", "text/latex"} & set(data):
                data["text/markdown"] = _set_formulas_aside("".join(data.pop(kind)), formulas, notebook)
    exporter = HTMLExporter(
        template_name="basic", exclude_anchor_links=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(content)
    return _tidy(_FORMULA.sub(lambda match: formulas[int(match[1])], body))


_FORMULA = re.compile(r"reproformula(\d+)end")


def _set_formulas_aside(markdown: str, formulas: list[str], notebook: Path) -> str:
    """Replace `$..$` and `$$..$$` outside code by words that Markdown leaves alone; what they stand for goes to `formulas`."""
    from latex2mathml.converter import convert

    def replace(match: re.Match) -> str:
        if match["code"] is not None:
            return match[0]
        if match["dollar"]:  # else nbconvert would look for a formula of its own here
            formulas.append("$")
            return f"reproformula{len(formulas) - 1}end"
        latex, display = (match["block"], "block") if match["block"] is not None else (match["inline"], "inline")
        try:
            formula = convert(latex.strip(), display=display)
        except Exception as error:  # latex2mathml has a dozen exceptions without a common base
            raise ReproError(f"{notebook}: cannot translate the formula {latex!r}: {type(error).__name__}") from error
        if unknown := re.search(r"\\\w+", formula):  # it sets a command that it does not know as an identifier
            raise ReproError(f"{notebook}: cannot translate {unknown[0]} in the formula {latex!r}")
        formulas.append(formula)
        return f"reproformula{len(formulas) - 1}end"

    return _CODE_OR_MATH.sub(replace, markdown)


def _tidy(body: str) -> str:
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(body, "html.parser")
    for script in soup.find_all("script"):
        script.decompose()
    for wide in soup.find_all(["table", "pre"]):
        wide.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    for formula in soup.find_all("math", display="block"):
        formula.wrap(soup.new_tag("span", attrs={"class": "scroll formula", "tabindex": "0"}))
    heading = ""
    for node in soup.find_all(["h1", "h2", "h3", "img"]):
        if node.name != "img":
            heading = node.get_text()
        elif node.get("alt", "").startswith("No description"):
            node["alt"] = f"Output of the notebook: {heading}" if heading else "Output of the notebook"
    return str(soup)
