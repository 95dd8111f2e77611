"""Figures are the same bytes twice, marked when they are no evidence, and keep ours and the paper's apart."""

import matplotlib
import numpy as np
import pytest

from repro.errors import ReproError
from repro.report import plots


def draw():
    with plots.shared_look():
        figure, ax = plots.new_figure()
        plots.band(ax, [1, 2, 3], [5.0, 4.0, 3.0], [4.5, 3.5, 2.5], [5.5, 4.5, 3.5], "sparse")
        plots.paper(ax, [1, 3], [5.2, 3.1], "image", linestyle="--")
        ax.set(xlabel="epoch", ylabel="loss (nats)", title="A loss")
        plots.ours_and_paper_legend(ax)
    return figure


def test_same_figure_same_bytes(tmp_path):
    """Drawn twice, SVG and PNG are equal byte for byte: no date, no random ids."""
    first, second = (plots.save_figure(draw(), tmp_path / name, "laptop") for name in ("a.1", "b.1"))
    assert [path.name for path in first] == ["a.1.svg", "a.1.png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert b"<dc:date>" not in first[0].read_bytes()
    assert first[1].read_bytes().startswith(b"\x89PNG")


def test_smoke_figures_say_so(tmp_path):
    """The watermark is on smoke figures and on no other."""
    smoke, laptop = draw(), draw()
    plots.save_figure(smoke, tmp_path / "smoke", "smoke")
    plots.save_figure(laptop, tmp_path / "laptop", "laptop")
    assert [text.get_text() for text in smoke.texts] == ["smoke run, not evidence"]
    assert not laptop.texts


def test_paper_is_last_and_tagged():
    """The legend says how the paper's value is known and puts it after ours; a value from its text needs no tag."""
    (legend,) = draw().legends
    assert [text.get_text() for text in legend.get_texts()] == ["sparse", "paper (image)"]
    assert plots.paper_label("read") == "paper"
    with pytest.raises(ReproError, match="read, image, remembered, derived"):
        plots.paper_label("guessed")


def test_missing_intervals_are_not_drawn():
    """One seed has no interval: a line without shade, a point without bar; a bound off by rounding is no error."""
    _, ax = plots.new_figure()
    nan = np.full(2, np.nan)
    plots.band(ax, [1, 2], [1.0, 2.0], nan, nan, "one seed")
    assert not ax.collections
    plots.points(ax, [1, 2], [1.0, 2.0], [np.nan, 2.0 + 1e-12], [np.nan, 2.5], "points")
    (bars,) = ax.collections
    lengths = [segment[:, 1].max() - segment[:, 1].min() for segment in bars.get_segments()]
    assert lengths == pytest.approx([0, 0.5])


def test_reader_keeps_their_settings():
    """Our look ends with our block: the reader's fonts and colours are theirs again, and theirs do not leak into ours."""
    with matplotlib.rc_context({"font.size": 31, "axes.grid": False}):
        with plots.shared_look():
            assert matplotlib.rcParams["axes.grid"] and matplotlib.rcParams["font.size"] == 10
        assert matplotlib.rcParams["font.size"] == 31
