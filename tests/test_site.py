"""The report is complete, the same bytes twice, readable in a browser at both widths, and says which notebook failed."""

import math
import shutil
from dataclasses import replace

import browser
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from repro.errors import ReproError
from repro.report import plots, site
from repro.report.notebooks import execute, execute_all, html_body
from repro.report.verdicts import FAILS, HOLDS, NOT_TESTABLE, TREND, Claim, decide

TITLES = {"toy": "Exploring Toys in Recurrent Rooms"}
WIDE = "pd.DataFrame([range(40)], columns=[f'a long column {n}' for n in range(40)])"
TEACHING = r"""# A toy exhibit

The threshold grows as $\theta_t = \frac{2 q f}{2(r - s) + 3(e - r)}$, costs $5 and keeps `$code$`.

$$ \epsilon = \theta \sum_{i=1}^{100} |w_i| \cdot \mathbb{1}[t > s] + \frac{a + b + c + d + e + f + g + h + i + j}{m} +
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa $$
"""
needs_browser = pytest.mark.skipif(browser.find_chromium() is None, reason="no Chromium on the path to look at pages with")


def claim(number, kind="substituted", **changes):
    rule = {"quantity": f"quantity_{number}", "definition": "100 * (ours - theirs) / theirs, paired", "unit": "%"}
    ranges = {"holds": (5.0, 15.0)} | ({} if kind == "exact" else {"trend": (0.0, math.inf)})
    if kind == "untestable":
        rule, ranges = {"reason": "No such card.", "instead": "sizes are recomputed."}, {}
    common = {
        "study": "toy", "id": f"T{number}", "topic": "Accuracy" if number < 3 else "Speed", "where": "Table 3",
        "text": "A sparse network is about 10% worse than its dense baseline | as printed.", "exhibit": "table1",
        "paper": "10% higher CER", "kind": kind, "headline": number == 1,
    }  # fmt: skip
    return Claim(**(common | rule | ranges | changes))


@pytest.fixture(scope="module")
def ledger():
    return [
        decide(claim(1), [8, 9.1234, 12], "made speech"),
        decide(claim(2, "exact"), 11.62),
        decide(claim(3), [-5, -6, -7, -8], "made speech"),
        decide(claim(4, "untestable", exhibit="figure9")),
        decide(claim(5, "machine")),
    ]


@pytest.fixture(scope="module")
def exhibits(tmp_path_factory):
    """Two toy exhibits: an executed notebook with formulas, a wide table and a figure; and a figure alone."""
    folder = tmp_path_factory.mktemp("exhibits")
    figure, ax = plots.new_figure()
    ax.plot([1, 2], [3, 4])
    svg, png = plots.save_figure(figure, folder / "table1", "laptop")
    notebook = new_notebook(
        cells=[
            new_markdown_cell(TEACHING),
            new_code_cell("width = 3  # layers", metadata={"tags": ["parameters"]}),
            new_code_cell(
                "import pandas as pd\nfrom IPython.display import Image\n"
                f"print('wide ' * 80, width)\ndisplay(Image({str(png)!r}))\n{WIDE}"
            ),
        ]
    )
    nbformat.write(notebook, folder / "source.ipynb")
    executed = execute(folder / "source.ipynb", folder / "executed.ipynb", {"width": 1e-06})
    csv = folder / "table1.csv"
    csv.write_text("a,b\n1,2\n")
    return [
        site.ExhibitPage(
            study="toy",
            name="table1",
            title="Table 1",
            caption="What it is.",
            notebook=executed,
            figures=(png, svg),
            csv=(csv,),
        ),
        site.ExhibitPage(study="toy", name="table2", title="Table 2", caption="Another.", figures=(svg,)),
    ]


def build(folder, ledger, exhibits, **changes):
    records = pd.DataFrame({"trial": ["speech"] * 3, "key": ["ab" * 32] * 3, "seconds": [1.5, math.nan, 3]})
    given = {
        "titles": TITLES, "provenance": {"commit": "0" * 40, "machine": "a toy, 2 cores"}, "records": records,
        "profile": "laptop", "source": "made speech",
    }  # fmt: skip
    return site.build_site(folder, ledger, exhibits, **(given | changes))


@pytest.fixture(scope="module")
def report(tmp_path_factory, ledger, exhibits):
    return build(tmp_path_factory.mktemp("report"), ledger, exhibits).parent


def test_index_opens_on_every_verdict(report, ledger):
    """Each claim is on the index with its verdict in words, its number with interval and seeds, and its reason."""
    page = browser.BeautifulSoup((report / "index.html").read_text(), "html.parser")
    for verdict in ledger:
        row = page.find(id=f"toy-{verdict.claim.id}")
        assert row.find(class_="chip").text == verdict.verdict
        assert verdict.reason in row.text and verdict.claim.paper in row.text
    first = page.find(id="toy-T1").find("td", attrs={"data-label": "ours"}).text
    assert " ".join(first.split()) == "9.71% [8, 12], 3 seeds"
    assert "11.6% exact" in " ".join(page.find(id="toy-T2").text.split())
    assert [item.text.split()[0] for item in page.find(class_="counts").find_all("li")] == ["1", "1", "1", "1", "1"]
    assert page.find(id="toy-T4").find("a") is None, "an exhibit without a page is no link"
    assert not page.find_all("script")


def test_exhibit_page_shows_its_notebook(report):
    """The notebook is on the page with its output and formulas as MathML; code keeps its dollars; files can be fetched."""
    text = (report / "toy" / "table1.html").read_text()
    page = browser.BeautifulSoup(text, "html.parser")
    assert [heading.text for heading in page.find_all("h1")] == ["Table 1"], "the notebook's own title would say it twice"
    assert page.find("math", display="block") and page.find("math", display="inline").find("mfrac")
    assert "costs $5 and keeps" in text and page.find("code", string="$code$") and "reproformula" not in text
    assert page.find("th", string="a long column 39").find_parent(class_="scroll")
    assert page.find("img", alt="Output of the notebook: A toy exhibit", src=True)
    assert {link["href"] for link in page.select(".downloads a")} == {"table1.png", "table1.svg", "table1.csv", "table1.ipynb"}
    assert len(page.select(".claims li")) == 4


def test_parameters_reach_the_notebook_unchanged(report):
    """A small float stays a float on its way in: papermill's own command line would make the text '1e-06' of it."""
    page = browser.BeautifulSoup((report / "toy" / "table1.html").read_text(), "html.parser")
    assert "width = 1e-06" in page.text and page.find(class_="output_stdout").text.rstrip().endswith(" 1e-06")


def test_same_report_twice(report, tmp_path, ledger, exhibits):
    """The same verdicts, exhibits and records give the same bytes in every file."""
    again = build(tmp_path, ledger, exhibits).parent
    files = sorted(path.relative_to(report) for path in report.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        assert (report / file).read_bytes() == (again / file).read_bytes(), file


def test_smoke_report_says_so(report, tmp_path, ledger):
    """A smoke report warns on its pages, another does not."""
    smoke = build(tmp_path, ledger, [], profile="smoke")
    assert "no evidence" in smoke.read_text() and "no evidence" not in (report / "index.html").read_text()


def test_text_is_escaped(tmp_path):
    """What a claim or a fact says is shown, never interpreted."""
    ledger = [decide(claim(1, text="<b>w & |w| < epsilon</b>"), [1, 2, 3])]
    index = build(tmp_path, ledger, [], provenance={"commit": "<script>"})
    assert "&lt;b&gt;w &amp; |w| &lt; epsilon" in index.read_text()
    assert "&lt;script&gt;" in (tmp_path / "provenance.html").read_text()


def test_mistakes_are_named(tmp_path, ledger, exhibits):
    """A missing figure, a repeated exhibit, a study without a title: one sentence each."""
    lost = site.ExhibitPage(study="toy", name="lost", title="Lost", figures=(tmp_path / "lost.svg",))
    with pytest.raises(ReproError, match=r"no file .*lost\.svg"):
        build(tmp_path, ledger, [lost])
    with pytest.raises(ReproError, match="toy/table2 is given twice"):
        build(tmp_path, ledger, [exhibits[1], exhibits[1]])
    with pytest.raises(ReproError, match="no title for study 'toy'"):
        build(tmp_path, ledger, [], titles={"other": "Other"})


@needs_browser
def test_report_in_a_browser(report):
    """No broken link or image, nothing wider than 400 or 1400 px, no request to the network."""
    assert browser.check_report(report) == []


@needs_browser
def test_browser_check_sees_what_is_wrong(report, tmp_path):
    """Each fault put into a good report is found: otherwise the check above would prove nothing."""
    broken = shutil.copytree(report, tmp_path / "broken")
    page = broken / "toy" / "table2.html"
    faults = (
        '<a href="gone.html">a</a><a href="../index.html#nowhere">b</a><img src="gone.png" alt="c">'
        '<div style="width:600px">d</div><img src="http://127.0.0.1:9/e.png" alt="e"><img src="table2.png">'
    )
    page.write_text(page.read_text().replace("</main>", faults + "</main>"))
    complaints = "\n".join(browser.check_report(broken))
    for expected in (
        "gone.html leads to no file", "index.html#nowhere leads to no place", "image gone.png is not shown",
        "table2.html at 400 px is 6", "network for http://127.0.0.1:9/e.png", "image table2.png has no alternative text",
    ):  # fmt: skip
        assert expected in complaints
    assert "at 1400 px is" not in complaints


def test_failing_notebook_is_named_and_the_others_run(tmp_path):
    """The error names notebook, cell and last line of the error; the good notebook is done; no half notebook poses as whole."""
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")]), tmp_path / "good.ipynb")
    failing = new_notebook(cells=[new_code_cell("1"), new_code_cell("raise ValueError('first line\\nthe last line')")])
    nbformat.write(failing, tmp_path / "bad.ipynb")
    lines = []
    tasks = [(tmp_path / f"{name}.ipynb", tmp_path / "out" / f"{name}.ipynb", {}) for name in ("bad", "good")]
    with pytest.raises(ReproError, match=r"bad\.ipynb failed in cell \[2\]: the last line"):
        execute_all(tasks, jobs=2, progress=lines.append)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bad.failed.ipynb", "good.ipynb"]
    assert len(lines) == 2 and any("[2/2]" in line for line in lines) and sum("FAILED" in line for line in lines) == 1
    with pytest.raises(ReproError, match="no notebook"):
        execute(tmp_path / "none.ipynb", tmp_path / "out.ipynb", {})


def test_a_killed_process_is_told_with_the_notebook_it_ran(tmp_path):
    """As when memory runs out; the kernel's parent is the process that runs notebooks."""
    nbformat.write(new_notebook(cells=[new_code_cell("import os; os.kill(os.getppid(), 9)")]), tmp_path / "deadly.ipynb")
    with pytest.raises(ReproError, match=r"deadly\.ipynb was not run to its end"):
        execute_all([(tmp_path / "deadly.ipynb", tmp_path / "out.ipynb", {})], progress=lambda line: None)
    assert not (tmp_path / "out.ipynb").exists()


def test_untranslatable_formula_is_named(tmp_path):
    """A formula that cannot be shown is an error with the notebook's name, not a hole in the page."""
    for formula in (r"\frac", r"\nosuchcommand{x}", "x^"):
        nbformat.write(new_notebook(cells=[new_markdown_cell(f"${formula}$")]), tmp_path / "odd.ipynb")
        with pytest.raises(ReproError, match=r"odd\.ipynb: cannot translate"):
            html_body(tmp_path / "odd.ipynb")


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (9.70785, "%", "9.71%"), (-0.75, "%", "−0.750%"), (6.8, "x", "6.80×"), (27500, "iterations", "27,500 iterations"),
        (0.0123, "1", "0.0123"), (0, "points", "0 points"), (1234.5, "", "1,234"), (2e-7, "", "2.0e−07"),
        (math.inf, "", "∞"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_reading(value, unit, shown):
    """Three significant digits, grouped thousands, a real minus, the unit attached."""
    assert site.quantity(value, unit) == shown


def test_scoreboard_counts_and_headlines(ledger):
    """The README's table counts verdicts per study and shows headline claims only, in cells that Markdown keeps apart."""
    board = site.scoreboard_markdown([replace(v, source="toy corpus") for v in ledger], TITLES)
    assert "| Exploring Toys in Recurrent Rooms | 1 | 1 | 1 | 1 | 1 |" in board
    headline = board.splitlines()[-1]
    assert (
        headline.endswith("| 10% higher CER | 9.71% [8, 12], 3 seeds, toy corpus | **holds as a trend** |")
        and r"baseline \| as" in headline
    )
    assert board.count("**") == 2
    assert list(site.count_verdicts(ledger)) == [HOLDS, TREND, FAILS, "undecided", NOT_TESTABLE]


def test_only_the_part_between_markers_changes():
    """The scoreboard replaces what stands between its markers, twice to the same text; missing markers are an error."""
    readme = "a\n<!-- scoreboard:begin -->\nold\n<!-- scoreboard:end -->\nz\n"
    once = site.replace_between_markers(readme, "scoreboard", "| new |\n")
    assert once == "a\n<!-- scoreboard:begin -->\n| new |\n<!-- scoreboard:end -->\nz\n"
    assert site.replace_between_markers(once, "scoreboard", "| new |") == once
    for text in ("a", "<!-- scoreboard:end --><!-- scoreboard:begin -->", readme + readme):
        with pytest.raises(ReproError, match="scoreboard:begin"):
            site.replace_between_markers(text, "scoreboard", "new")
