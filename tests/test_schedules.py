"""Schedules of collectives, played on sets of contributions instead of numbers."""

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.collectives.programs import program
from repro.collectives.schedules import ALGORITHMS, COLLECTIVES, Transfer, figure2_allreduce, schedule, steps
from repro.errors import ReproError


def play(transfers, ranks: int, length: int) -> list[list[Counter]]:
    """Per rank and element, how often each rank's contribution is in it, at the end; all transfers of a step at once."""
    held = [[Counter({rank: 1}) for _ in range(length)] for rank in range(ranks)]
    for _, step in groupby(transfers, lambda t: t.step):
        sent = [(t, held[t.source][t.start : t.stop]) for t in step]
        for t, message in sent:
            for element, arriving in zip(range(t.start, t.stop), message, strict=True):
                held[t.target][element] = held[t.target][element] + arriving if t.reduce else arriving
    return held


anything = st.fixed_dictionaries(
    {
        "collective": st.sampled_from(COLLECTIVES),
        "algorithm": st.sampled_from(ALGORITHMS),
        "ranks": st.integers(1, 9),
        "length": st.integers(0, 20),
        "block": st.none() | st.integers(1, 7),
        "seed": st.integers(0, 8),
    }
)


def build(case: dict) -> tuple[tuple[Transfer, ...], int]:
    root = case["seed"] % case["ranks"]
    return schedule(*(case[name] for name in ("collective", "algorithm", "ranks", "length", "block")), root), root


@settings(max_examples=400, deadline=None)
@given(anything)
def test_every_contribution_arrives_exactly_once_where_it_should(case):
    transfers, root = build(case)
    held = play(transfers, case["ranks"], case["length"])
    everything = Counter(range(case["ranks"]))
    if case["collective"] == "allreduce":
        assert all(element == everything for rank in held for element in rank)
    elif case["collective"] == "reduce":
        assert all(element == everything for element in held[root])
    else:
        assert all(element == Counter({root: 1}) for rank in held for element in rank)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_each_link_direction_carries_one_transfer_a_step_and_none_is_empty(case):
    if case["algorithm"] == "two-way ring" and (case["ranks"] == 2 or case["collective"] != "allreduce"):
        return  # two rings over one link, two trees at once
    transfers, _ = build(case)
    links = Counter((t.step, t.source, t.target) for t in transfers)
    assert all(count == 1 for count in links.values())
    assert all(t.start < t.stop and t.source != t.target for t in transfers)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_ports_are_used_once_a_step_but_by_algorithms_that_go_both_ways(case):
    if case["algorithm"] == "two-way ring" or (case["algorithm"], case["collective"]) == ("linear pipeline", "allreduce"):
        return
    transfers, _ = build(case)
    assert len({(t.step, t.source) for t in transfers}) == len(transfers) == len({(t.step, t.target) for t in transfers})


@settings(max_examples=200, deadline=None)
@given(anything)
def test_a_program_waits_for_all_that_its_sends_depend_on(case):
    """Played without steps, in any order the programs allow, the result is that of the schedule: here the laziest order."""
    transfers, root = build(case)
    ranks, length = case["ranks"], case["length"]
    names = [case[name] for name in ("collective", "algorithm", "ranks", "length", "block")]
    programs = [program(rank, *names, root) for rank in range(ranks)]
    held = [[Counter({rank: 1}) for _ in range(length)] for rank in range(ranks)]
    wires: dict[tuple[int, int], list] = {}
    receipts = Counter()
    sent, received = [0] * ranks, [0] * ranks
    progress = True
    while progress:
        progress = False
        for rank, (receives, sends, _) in enumerate(programs):
            while sent[rank] < len(sends) and sends[sent[rank]].after <= received[rank]:
                if sends[sent[rank]].receipt and not receipts.get((sends[sent[rank] - 1].target, rank)):
                    break
                if sends[sent[rank]].receipt:
                    receipts[sends[sent[rank] - 1].target, rank] -= 1
                target, start, stop, *_ = sends[sent[rank]]
                wires.setdefault((rank, target), []).append((start, stop, [Counter(c) for c in held[rank][start:stop]]))
                sent[rank], progress = sent[rank] + 1, True
            if received[rank] < len(receives) and wires.get((receives[received[rank]].source, rank)):
                source, start, stop, reduce, receipt = receives[received[rank]]
                receipts[rank, source] += receipt
                *span, message = wires[source, rank].pop(0)
                assert span == [start, stop], "messages of a link arrive in the order in which they are expected"
                for element, arriving in zip(range(start, stop), message, strict=True):
                    held[rank][element] = held[rank][element] + arriving if reduce else arriving
                received[rank], progress = received[rank] + 1, True
    assert held == play(transfers, ranks, length)
    assert not any(wires.values()) and not any(receipts.values()), "nothing is sent that is not taken"


def test_the_steps_of_figure_2():
    """4 blocks on 3 ranks: 5 steps for broadcast and reduce, so p - 2 + n/b; 9 for the paper's allreduce, 7 with both
    directions of every link in use."""
    counts = {collective: steps(schedule(collective, "linear pipeline", 3, 4, 1)) for collective in COLLECTIVES}
    assert counts == {"broadcast": 5, "reduce": 5, "allreduce": 7}
    transfers = figure2_allreduce(3, 4)
    assert steps(transfers) == 9
    assert all(element == Counter(range(3)) for rank in play(transfers, 3, 4) for element in rank)


@pytest.mark.parametrize("ranks", range(2, 10))
def test_step_counts_are_those_of_the_literature(ranks):
    levels = (ranks - 1).bit_length()
    power = ranks == 1 << levels
    counts = {name: steps(schedule("allreduce", name, ranks, 16 * ranks)) for name in ALGORITHMS}
    assert counts["ring"] == counts["two-way ring"] == counts["all-to-all"] == 2 * (ranks - 1)
    assert counts["minimum spanning tree"] == 2 * levels
    assert counts["bidirectional exchange"] == (2 * levels if power else 2 * (levels - 1) + 2)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["ring", "two-way ring", "bidirectional exchange", "all-to-all"])
def test_allreduce_sends_the_fewest_bytes_possible(name, ranks):
    """2 (p - 1) / p of the message a rank (Patarasu and Yuan 2009)."""
    length = 16 * ranks
    sent = Counter()
    for t in schedule("allreduce", name, ranks, length):
        sent[t.source] += t.stop - t.start
    assert set(sent.values()) == {2 * (ranks - 1) * length // ranks}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("gather", "ring", 2, 4), "gather"),
        (("reduce", "rung", 2, 4), "rung"),
        (("reduce", "ring", 0, 4), "0 ranks"),
        (("reduce", "ring", 2, 4, 0), "block 0"),
        (("reduce", "ring", 2, 4, None, 2), "root 2"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ReproError, match=named):
        schedule(*arguments)
