"""The published numbers and claims are complete, tagged and consistent, and a slip in their files is named."""

import math

import pytest

from repro.errors import ReproError
from repro.report.published import KNOWN, load_published, published_value
from repro.report.verdicts import load_claims

HEADER = "exhibit,series,x,metric,value,unit,known,where"
ROW = "table1,freq,,iterations,100,iterations,image,Table 1"
CLAIM = """
[[claim]]
id = "T1"
topic = "Size"
text = "It is smaller."
where = "abstract"
exhibit = "table1"
paper = "8x"
kind = "substituted"
quantity = "size_ratio"
definition = "dense / sparse"
unit = "x"
holds = [7, 9]
trend = [1, inf]
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Write the two files of a study `toy` in a folder of its own; returns the function that does."""
    papers = tmp_path / "data" / "papers"
    papers.mkdir(parents=True)
    monkeypatch.setenv("REPRO_ROOT", str(tmp_path))

    def write(csv_text="", toml_text=""):
        (papers / "toy.csv").write_text(csv_text)
        (papers / "toy.toml").write_text(toml_text)

    return write


def test_every_exhibit_of_narang2017_is_there():
    """Tables 1-6, the four figures, sections 5.2 and 6.2 and the prose all have rows, in all four kinds of knowing."""
    frame = load_published("narang2017")
    tables = {f"table{number}" for number in range(1, 7)}
    assert set(frame["exhibit"]) == tables | {
        "figure1a", "figure1b", "figure2a", "figure2b", "memory", "onchip", "prose",
    }  # fmt: skip
    assert set(frame["known"]) == set(KNOWN)
    assert frame["value"].notna().all()


def test_printed_relations_of_table3_hold_in_our_copy():
    """The relative performances follow from the CERs to rounding, except the one the paper itself has wrong: a typing check."""
    table = (
        load_published("narang2017").query("exhibit == 'table3'").pivot(index=["series", "x"], columns="metric", values="value")
    )
    table = table.dropna(subset="cer_percent")
    base = {"RNN": table.loc[("RNN Dense Baseline", 1760), "cer_percent"], "GRU": table.loc[("GRU Dense", 2560), "cer_percent"]}
    for (series, _), row in table.iterrows():
        recomputed = 100 * (base[series[:3]] - row["cer_percent"]) / base[series[:3]]
        assert row["relative_percent_recomputed"] == pytest.approx(recomputed, abs=0.0051)
        if series != "RNN Dense Medium":
            assert row["relative_percent"] == pytest.approx(recomputed, abs=0.1)
    assert len(table) == 9


def test_layer_counts_sum_to_the_totals():
    """Tables 2 and 5 add up to the totals given, and their closed forms give each cell."""
    frame = load_published("narang2017")
    for exhibit, hidden in (("table2", 1760), ("table5", 2560)):
        layers = frame[(frame["exhibit"] == exhibit) & (frame["known"] == "remembered")]
        assert layers["value"].sum() == published_value("narang2017", exhibit, "total", "parameters", hidden).value
    h = 1760
    assert published_value("narang2017", "table2", "bidirectional recurrent linear", "parameters", 3).value == 3 * h * h + 2 * h
    h = 2560
    assert published_value("narang2017", "table5", "gated recurrent linear", "parameters", 2).value == 3 * h * (h + 1312 + 2)


def test_table6_speedups_follow_from_its_times():
    """Each printed speed-up is the smaller dense layer's time over the row's, to the digits printed."""
    for kind, base in (("RNN", 1760), ("GRU", 2560)):
        dense = published_value("narang2017", "table6", f"{kind} dense", "time_us", base).value
        rows = load_published("narang2017").query(f"exhibit == 'table6' and series == '{kind} sparse'")
        wide = rows.pivot(index="x", columns="metric", values="value")
        assert ((dense / wide["time_us"] - wide["speedup"]).abs() < 0.05).all()


def test_value_carries_its_source():
    """A published number comes with its unit, how it is known and where it stands."""
    found = published_value("narang2017", "table3", "RNN Sparse Medium", "cer_percent")
    assert found == (10.59, "%", "image", "Table 3 (development set)")


def test_unknown_names_list_what_exists():
    """A wrong exhibit, series, metric or x is answered with the valid ones."""
    cases = [
        (("table7", "freq", "iterations"), "table6"),
        (("table1", "frequency", "iterations"), "freq"),
        (("table1", "freq", "epochs"), "iterations"),
        (("table4", "hard pruning", "cer_percent", 6), "5.0 | 7.0 | 10.0"),
        (("table4", "hard pruning", "cer_percent"), "one of 5, 7, 10, 12, 15"),
    ]
    for arguments, listed in cases:
        with pytest.raises(ReproError) as error:
            published_value("narang2017", *arguments)
        assert listed in str(error.value)
    with pytest.raises(ReproError, match="narang2017"):
        load_published("narang1999")


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("exhibit,series,x\n", 1, "header"),
        (f"{HEADER}\n{ROW},more\n", 2, "9 cells"),
        (f"{HEADER}\n{ROW}\n{ROW}\n", 3, "already on line 2"),
        (f"{HEADER}\n{ROW.replace('image', 'guessed')}\n", 2, "guessed"),
        (f"{HEADER}\n{ROW.replace('100', 'many')}\n", 2, "many"),
        (f"{HEADER}\n{ROW.replace('100', 'nan')}\n", 2, "finite"),
        (f"{HEADER}\n{ROW.replace('freq,,', 'freq,first,')}\n", 2, "first"),
        (f"{HEADER}\n{ROW.replace('Table 1', '')}\n", 2, "where is empty"),
    ],
)
def test_slips_in_the_numbers_name_file_and_line(toy, text, line, complaint):
    """A damaged row is refused with the file, its line and what is wrong."""
    toy(text)
    with pytest.raises(ReproError, match=complaint) as error:
        load_published("toy")
    assert f"toy.csv, line {line}" in str(error.value)


def test_row_without_x_is_read(toy):
    """An empty x is a number that has none, not a zero."""
    toy(f"{HEADER}\n{ROW}\n")
    assert math.isnan(load_published("toy").loc[0, "x"])
    assert published_value("toy", "table1", "freq", "iterations").value == 100


def test_claims_of_narang2017_cover_its_headlines():
    """All kinds occur, and each testable claim has its own quantity with a definition."""
    claims = load_claims("narang2017")
    assert {claim.kind for claim in claims} == {"exact", "substituted", "machine", "untestable"}
    quantities = [claim.quantity for claim in claims if claim.kind != "untestable"]
    assert len(set(quantities)) == len(quantities) and all(name.isidentifier() for name in quantities)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('kind = "substituted"', 'kind = "likely"', "likely"),
        ("trend = [1, inf]", "", "trend is missing"),
        ("trend = [1, inf]", "trend = [1, inf]\nweight = 2", "unknown key weight"),
        ("holds = [7, 9]", "holds = [9, 7]", "low <= high"),
        ("holds = [7, 9]", "holds = [0, 9]", "outside trend"),
        ("trend = [1, inf]", "trend = [-inf, inf]", "at most one"),
        ('definition = "dense / sparse"', 'definition = ""', "definition"),
        ('kind = "substituted"', 'kind = "untestable"', "unknown key definition, holds"),
    ],
)
def test_slips_in_the_claims_name_file_and_claim(toy, old, new, complaint):
    """A claim without its rule, or with one that says nothing, is refused with the file and its id."""
    toy(toml_text=CLAIM.replace(old, new))
    with pytest.raises(ReproError, match=complaint) as error:
        load_claims("toy")
    assert "toy.toml, claim T1" in str(error.value)


def test_claims_are_told_apart(toy):
    """Two claims may share neither id nor quantity."""
    toy(toml_text=CLAIM)
    assert load_claims("toy")[0].trend == (1, math.inf)
    toy(toml_text=CLAIM + CLAIM)
    with pytest.raises(ReproError, match="used by an earlier claim"):
        load_claims("toy")
