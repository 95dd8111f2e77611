"""The formulas are the simulator's times, the paper's own as printed; limits, blocks and bandwidths follow from them."""

import math

import numpy as np
import pytest

from repro.collectives.costs import (
    PRINTED_ALGORITHMS,
    Link,
    algorithm_bandwidth,
    best_block,
    bus_bandwidth,
    cost,
    limit,
    printed_cost,
    terms,
)
from repro.collectives.schedules import ALGORITHMS, COLLECTIVES, schedule
from repro.collectives.simulator import Machine, play
from repro.errors import ReproError

PIPELINE, RING, TWO_WAY, TREE, EXCHANGE, ALL_TO_ALL = ALGORITHMS
LINKS = (Link(1, 0), Link(0, 1), Link(1e-6, 1e-9), Link(3e-5, 2e-10, 7e-11), Link(1e-6, 1e-9, 4e-9))
PAPER = Link(1e-7, 1e-9)


def simulated(collective, algorithm, ranks, length, link, block=None):
    """Seconds of a message of float32 elements; `block` in elements."""
    return play(schedule(collective, algorithm, ranks, length, block), Machine.uniform(ranks, link)).seconds


def blocks(algorithm, length, ranks):
    """Numbers of elements in a block: all in one, one each, a block that parts need not be whole multiples of, a larger one."""
    return (None, 1, max(1, length // (2 * ranks)), 2 * length) if algorithm in (PIPELINE, RING, TWO_WAY) else (None,)


def is_exact(collective, algorithm, ranks, number_of_blocks, link):
    """Where `terms` claims to be the simulator's time; elsewhere it claims to be a lower bound."""
    if (algorithm, collective) == (PIPELINE, "allreduce"):
        return link.gamma == 0 or ranks <= 4 or number_of_blocks <= 4
    if (algorithm, collective) == (TWO_WAY, "broadcast"):
        return False
    beyond = ranks - 2 ** int(math.log2(ranks))
    return algorithm != EXCHANGE or collective == "broadcast" or beyond == 0 or 2 * beyond >= ranks - beyond


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_cost_is_what_the_simulator_takes(collective, algorithm):
    """Equal parts, 2 to 9 ranks: exact where claimed; a lower bound within a quarter elsewhere."""
    for ranks in range(2, 10):
        for length in (part * math.lcm(2 * ranks, 8) for part in (1, 6)):
            for block in blocks(algorithm, length, ranks):
                for link in LINKS:
                    taken = simulated(collective, algorithm, ranks, length, link, block)
                    formula = cost(collective, algorithm, ranks, 4 * length, link, block and 4 * block)
                    if is_exact(collective, algorithm, ranks, length // (block or length), link):
                        assert taken == pytest.approx(formula, rel=1e-12, abs=0), (ranks, length, block, link)
                    else:
                        assert formula * (1 - 1e-12) <= taken <= 1.25 * formula, (ranks, length, block, link)


@pytest.mark.parametrize(
    ("collective", "algorithm", "ranks", "length", "block"),
    [
        ("allreduce", PIPELINE, 5, 7, 1),
        ("broadcast", TWO_WAY, 6, 24, None),
        ("reduce", EXCHANGE, 5, 20, None),
        ("allreduce", EXCHANGE, 9, 72, None),
    ],
)
def test_formulas_are_below_where_they_say_so(collective, algorithm, ranks, length, block):
    """The exceptions are needed: there messages do delay each other."""
    link = Link(1.0, 0.01, 0.005)
    formula = cost(collective, algorithm, ranks, 4 * length, link, block and 4 * block)
    assert simulated(collective, algorithm, ranks, length, link, block) > 1.01 * formula


@pytest.mark.parametrize("algorithm", [PIPELINE, RING])
@pytest.mark.parametrize("collective", ["broadcast", "reduce"])
def test_a_last_block_may_be_shorter(collective, algorithm):
    """60 elements in blocks of 7 over 2 to 6 ranks: none of the parts is a whole number of blocks."""
    for ranks in range(2, 7):
        for link in LINKS:
            taken = simulated(collective, algorithm, ranks, 60, link, block=7)
            assert taken == pytest.approx(cost(collective, algorithm, ranks, 240, link, block=28), rel=1e-12)


@pytest.mark.parametrize(
    ("algorithm", "collective", "expected"),
    [
        # Four ranks, 8 bytes; pipelines and rings in blocks of 2: messages, bytes sent, bytes reduced, one after another.
        (PIPELINE, "broadcast", (6, 12, 0)),  # 4 blocks over 3 links: the last is behind 3 others and crosses 3
        (PIPELINE, "reduce", (6, 12, 12)),
        (PIPELINE, "allreduce", (11, 22, 12)),  # in a rank's port 8 messages, 1 link before them and 2 after
        (RING, "broadcast", (5, 12, 0)),  # tree: 4 + 2 bytes; ring: 3 x 2
        (RING, "reduce", (5, 12, 6)),
        (RING, "allreduce", (6, 12, 6)),
        (TWO_WAY, "broadcast", (10, 12, 0)),
        (TWO_WAY, "reduce", (10, 12, 6)),
        (TWO_WAY, "allreduce", (12, 12, 6)),
        (TREE, "broadcast", (2, 16, 0)),
        (TREE, "reduce", (2, 16, 16)),
        (TREE, "allreduce", (4, 32, 16)),
        (EXCHANGE, "broadcast", (4, 12, 0)),
        (EXCHANGE, "reduce", (4, 12, 6)),
        (EXCHANGE, "allreduce", (4, 12, 6)),  # 4 + 2 + 2 + 4
        (ALL_TO_ALL, "broadcast", (6, 12, 0)),
        (ALL_TO_ALL, "reduce", (6, 12, 6)),
        (ALL_TO_ALL, "allreduce", (6, 12, 6)),
    ],
)
def test_terms_of_four_ranks_counted_by_hand(algorithm, collective, expected):
    block = 2 if algorithm in (PIPELINE, RING, TWO_WAY) else None
    assert terms(collective, algorithm, 4, 8, block) == expected


def test_extra_ranks_send_and_get_whole_messages():
    """Six ranks by exchange: two of them hand over 8 bytes and get 8 back, around the exchange of four."""
    assert terms("allreduce", EXCHANGE, 6, 8) == (2 + 4, 16 + 12, 8 + 6)
    assert terms("reduce", EXCHANGE, 6, 8) == (1 + 4, 8 + 12, 8 + 6)
    assert terms("broadcast", EXCHANGE, 6, 8) == (1 + 4, 8 + 12, 0)


def test_one_rank_or_no_bytes_cost_nothing():
    for algorithm in ALGORITHMS:
        assert cost("allreduce", algorithm, 1, 100, Link(1, 1, 1)) == 0
        assert cost("allreduce", algorithm, 4, 0, Link(1, 1, 1)) == 0
    assert printed_cost("allreduce", PIPELINE, 1, 100, Link(1, 1, 1)) == 0


def test_integers_of_a_table_will_do():
    """A column of a data frame holds numpy's integers."""
    ranks, nbytes = np.int64(6), np.int64(2400)
    for algorithm in ALGORITHMS:
        assert terms("allreduce", algorithm, ranks, nbytes, np.int64(8)) == terms("allreduce", algorithm, 6, 2400, 8)


@pytest.mark.parametrize(
    ("collective", "algorithm", "expected"),
    [
        # alpha 1, beta 100, gamma 10000, p = 4, n = 8, b = 2; log p = 2, p - 1 + n/b = 7, b (p - 1) + n = 14
        ("broadcast", PIPELINE, 7 + 1400),
        ("reduce", PIPELINE, 7 + 1400 + 140000),
        ("allreduce", PIPELINE, 14 + 2800 + 140000),
        ("broadcast", TREE, 2 + 1600),
        ("reduce", TREE, 2 + 1600 + 160000),
        ("allreduce", TREE, 4 + 3200 + 160000),
        ("broadcast", EXCHANGE, 5 + 1200),
        ("reduce", EXCHANGE, 4 + 1200 + 60000),
        ("allreduce", EXCHANGE, 4 + 1200 + 60000),
    ],
)
def test_printed_costs(collective, algorithm, expected):
    """Table 1 by hand for four ranks."""
    assert printed_cost(collective, algorithm, 4, 8, Link(1, 100, 10000), 2) == pytest.approx(expected)


def test_printed_costs_take_no_ceilings():
    """Three ranks: the tree has log2 3 levels there, and two in fact."""
    assert printed_cost("broadcast", TREE, 3, 1, Link(1, 0)) == pytest.approx(math.log2(3))
    assert cost("broadcast", TREE, 3, 1, Link(1, 0)) == 2


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [2, 5, 64])
def test_the_paper_counts_pipeline_steps_too_many(ranks, count):
    """p - 1 + n/b for p - 2 + n/b; allreduce 2 (p - 1 + n/b), where two ranks take n/b + 1 and more 2 (p + n/b) - 5."""
    start_up = Link(1, 0)
    for collective in ("broadcast", "reduce"):
        assert cost(collective, PIPELINE, ranks, count, start_up, 1) == ranks - 2 + count
        assert printed_cost(collective, PIPELINE, ranks, count, start_up, 1) == ranks - 1 + count
    assert cost("allreduce", PIPELINE, ranks, count, start_up, 1) == (count + 1 if ranks == 2 else 2 * (ranks + count) - 5)
    assert printed_cost("allreduce", PIPELINE, ranks, count, start_up, 1) == 2 * (ranks - 1 + count)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_limits_are_those_of_the_printed_costs(ranks, gamma):
    """A message of 10^16 bytes in blocks of 10^8 is long enough to see them to six digits."""
    link = Link(1e-3, 1.0, gamma)
    for collective in COLLECTIVES:
        for algorithm in PRINTED_ALGORITHMS:
            seconds, pipeline = (printed_cost(collective, name, ranks, 1e16, link, 1e8) for name in (algorithm, PIPELINE))
            assert limit(collective, algorithm, ranks, gamma) == pytest.approx(seconds / pipeline, rel=1e-6)


def test_limits_in_closed_form():
    """Exchange against pipeline 2 (p - 1) / p for broadcast and reduce, (p - 1) / p for allreduce; tree log2 p for all."""
    for ranks in (2, 3, 4, 6, 8, 1000):
        for collective in COLLECTIVES:
            factor = 1 if collective == "allreduce" else 2
            assert limit(collective, EXCHANGE, ranks) == pytest.approx(factor * (ranks - 1) / ranks)
            assert limit(collective, TREE, ranks) == pytest.approx(math.log2(ranks))
        assert limit("allreduce", EXCHANGE, ranks, 5.0) == pytest.approx((ranks - 1) / ranks)  # whatever adding costs
    assert limit("reduce", EXCHANGE, 4, 1e9) == pytest.approx(3 / 4)  # if it costs all, exchange wins that, too


def test_limits_are_those_of_our_schedules_for_powers_of_two():
    """Printed allreduce costs 2 n beta between two ranks, too, where the pipeline takes half of that."""
    for collective in COLLECTIVES:
        for ranks in (2, 4, 8):
            exchange, pipeline = (cost(collective, name, ranks, 2**40, Link(0, 1), 1) for name in (EXCHANGE, PIPELINE))
            expected = 1 if (collective, ranks) == ("allreduce", 2) else limit(collective, EXCHANGE, ranks)
            assert exchange / pipeline == pytest.approx(expected)


@pytest.mark.parametrize(("nbytes", "ranks", "expected"), [(200e6, 4, 81650), (200e6, 6, 63246), (50e6, 4, 40825)])
def test_best_block_for_the_constants_of_the_paper(nbytes, ranks, expected):
    """80 KB, 62 KB and 40 KB: the paper's 64 KB is right for its constants; with alpha = 10 us it would be ten times larger."""
    assert best_block(int(nbytes), ranks, PAPER) == expected
    assert best_block(int(nbytes), ranks, Link(1e-5, 1e-9)) == pytest.approx(10 * expected, rel=1e-4)


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_no_block_costs_less_than_the_best(ranks):
    """By the printed broadcast, among all whole numbers of bytes."""
    link, nbytes = Link(1e-6, 1e-9), 100_000
    costs = [printed_cost("broadcast", PIPELINE, ranks, nbytes, link, block) for block in range(1, nbytes + 1)]
    assert costs[best_block(nbytes, ranks, link) - 1] == pytest.approx(min(costs), rel=1e-9)


def test_best_block_lies_within_the_message():
    assert best_block(1000, 4, Link(1.0, 1e-9)) == 1000  # a dear start: one block
    assert best_block(1000, 4, Link(0.0, 1e-9)) == 1  # a free start: single bytes
    assert best_block(1000, 1, PAPER) == best_block(1000, 4, Link(1e-6, 0.0)) == 1000


def test_bus_bandwidth_of_the_best_is_that_of_the_link():
    """Without start-ups, and for long pipelines: busbw is 1 / beta for any number of ranks, and less for a tree."""
    link, nbytes = Link(0.0, 1e-9), 10**9
    for ranks in (2, 4, 7):
        ring = bus_bandwidth("allreduce", ranks, nbytes, cost("allreduce", RING, ranks, nbytes, link))
        assert ring == pytest.approx(1e9)
        for collective in ("broadcast", "reduce"):
            seconds = cost(collective, PIPELINE, ranks, nbytes, link, 1000)
            assert bus_bandwidth(collective, ranks, nbytes, seconds) == pytest.approx(1e9, rel=1e-5)
        assert bus_bandwidth("allreduce", ranks, nbytes, cost("allreduce", TREE, ranks, nbytes, link)) <= 1e9
    assert algorithm_bandwidth(3 * 10**9, 2.0) == 1.5e9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost("gossip", RING, 4, 8, PAPER), "unknown collective 'gossip'"),
        (lambda: cost("reduce", "star", 4, 8, PAPER), "unknown algorithm 'star'"),
        (lambda: cost("reduce", RING, 0, 8, PAPER), "over 0 ranks"),
        (lambda: cost("reduce", RING, 4, -8, PAPER), "-8 bytes"),
        (lambda: cost("reduce", RING, 4, 8, PAPER, 0), "block 0"),
        (lambda: printed_cost("reduce", RING, 4, 8, PAPER), "choose one of linear pipeline, minimum spanning tree"),
        (lambda: limit("reduce", EXCHANGE, 1), "at least 2"),
        (lambda: best_block(0, 4, PAPER), "0 bytes"),
        (lambda: Link(-1, 1), "not negative"),
        (lambda: Link(1, math.nan), "finite"),
        (lambda: bus_bandwidth("reduce", 4, 8, 0.0), "positive time"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ReproError, match=message):
        call()
