"""The simulator agrees with a naive one, with times counted by hand and Figure 2's steps; no schedule beats the bounds."""

import itertools
import math
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.collectives.costs import Link, cost
from repro.collectives.schedules import ALGORITHMS, COLLECTIVES, Transfer, figure2_allreduce, schedule, steps
from repro.collectives.simulator import DUPLEX, Machine, play
from repro.errors import ReproError

PIPELINE, RING, TWO_WAY, TREE, EXCHANGE, ALL_TO_ALL = ALGORITHMS
UNIT = Link(0, 1)  # a second an element, played with items of one byte


def seconds(machine, *arguments, **options):
    """Time of a schedule with elements of one byte."""
    return play(schedule(*arguments), machine, item_bytes=1, **options).seconds


def naive(transfers, machine, item_bytes, overlapped_reduce):
    """What `play` says it does, literally: look at every transfer in every tick; constants are small integers."""
    starts, across, ends, holders, adding = {}, {}, {}, {}, defaultdict(int)
    listed = list(enumerate(transfers))

    def issued(index, now):
        """Its receives up to the last that it waits for are done, and all sends of its rank before it are issued."""
        t = transfers[index]
        received = [(i, r) for i, r in listed if r.target == t.source]
        sends = [s for i, s in listed if s.source == t.source and i <= index]
        for s in sends:
            needed = [n for n, (_, r) in enumerate(received) if r.step < s.step and r.start < s.stop and s.start < r.stop]
            if any(ends.get(i, math.inf) > now for i, _ in received[: max(needed, default=-1) + 1]):
                return False
        return True

    now = 0
    while len(ends) < len(transfers):
        for index, t in listed:  # the bytes that are now across are added after those that were across before
            if across.get(index) == now and index not in ends:
                link = machine.link.gamma * (t.stop - t.start) * item_bytes if t.reduce and overlapped_reduce else 0
                adding[t.target] = max(adding[t.target], now) + link
                ends[index] = adding[t.target] if link else now
        for index, t in listed:
            link, path = machine.path(t.source, t.target)
            if index in starts or any(holders.get(part, 0) > now for part in path) or not issued(index, now):
                continue
            nbytes = (t.stop - t.start) * item_bytes
            starts[index] = now
            across[index] = now + link.alpha + link.beta * nbytes
            if t.reduce and not overlapped_reduce:
                across[index] += machine.link.gamma * nbytes
            holders |= dict.fromkeys(path, across[index])
        now += 1
    return [(starts[index], ends[index]) for index, _ in listed]


MACHINES = st.one_of(
    st.builds(lambda link, duplex: lambda p: Machine.uniform(p, link, duplex), st.just(Link(1, 1, 1)), st.sampled_from(DUPLEX)),
    st.just(lambda p: Machine.uniform(p, Link(0, 1, 2))),
    st.just(lambda p: Machine.two_sockets(p, Link(1, 1, 1), Link(2, 3), first=2)),
    st.just(lambda p: Machine.switches(p, Link(1, 2, 1), size=2)),
)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(COLLECTIVES),
    st.sampled_from(ALGORITHMS),
    st.integers(1, 6),
    st.integers(0, 9),
    st.sampled_from([None, 1, 2]),
    MACHINES,
    st.booleans(),
)
def test_every_start_and_end_is_that_of_the_naive_simulator(collective, algorithm, ranks, length, block, machine, overlapped):
    transfers = schedule(collective, algorithm, ranks, length, block, root=ranks // 2)
    entries = play(transfers, machine(ranks), 2, overlapped).entries
    assert [entry.transfer for entry in entries] == list(transfers)
    assert [(entry.start, entry.end) for entry in entries] == naive(transfers, machine(ranks), 2, overlapped)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(COLLECTIVES),
    st.sampled_from(ALGORITHMS),
    st.integers(2, 12),
    st.integers(1, 200),
    st.sampled_from([None, 1, 3, 16]),
    st.sampled_from([0.0, 2e-10]),
)
def test_no_schedule_beats_the_bounds(collective, algorithm, ranks, length, block, gamma):
    """Bytes that have to pass some port, doublings until all know, and bytes to be added somewhere (Chan et al. 2007)."""
    link, nbytes = Link(1e-6, 1e-9, gamma), 4 * length
    taken = play(schedule(collective, algorithm, ranks, length, block), Machine.uniform(ranks, link)).seconds
    ports = 2 * (ranks - 1) / ranks if collective == "allreduce" else 1
    added = 0 if collective == "broadcast" else (ranks - 1) / ranks
    bounds = link.alpha * math.ceil(math.log2(ranks)), (ports * link.beta + added * gamma) * nbytes
    if collective == "reduce":  # what reaches the root need not be added there
        bounds = bounds[0], max(ports * link.beta, added * (link.beta + gamma)) * nbytes
    assert taken >= max(bounds) * (1 - 1e-12)


def test_figure2_counts_nine_steps_and_ten():
    """Three GPUs, four blocks: broadcast and reduce 5 steps each, p - 2 + n/b, 10 in all; the ring's allreduce 9."""
    rooted = [schedule(collective, PIPELINE, 3, 4, block=1) for collective in ("broadcast", "reduce")]
    machine = Machine.uniform(3, UNIT)
    assert [steps(transfers) for transfers in rooted] == [5, 5] == [3 - 2 + 4] * 2
    assert [play(transfers, machine, 1).seconds for transfers in rooted] == [5, 5]
    assert steps(figure2_allreduce(3, 4)) == play(figure2_allreduce(3, 4), machine, 1).seconds == 9
    assert steps(schedule("allreduce", PIPELINE, 3, 4, 1)) == 7  # the chain's, were it not for the ports of rank 1:
    assert seconds(machine, "allreduce", PIPELINE, 3, 4, 1) == 9


def test_figure2_spreads_the_first_block_in_steps_five_and_six():
    """a'' reaches GPU 1 at the end of step 5 and GPU 2 at that of step 6; d0 leaves GPU 0 in step 4, just before."""
    ends = {
        (t.source, t.target, t.start, t.reduce): end
        for t, _, end in play(figure2_allreduce(3, 4), Machine.uniform(3, UNIT), 1).entries
    }
    assert ends[0, 1, 3, True] == 4
    assert (ends[0, 1, 0, False], ends[1, 2, 0, False]) == (5, 6)


@pytest.mark.parametrize(("ranks", "count"), [(2, 1), (2, 6), (5, 1), (5, 3), (9, 20)])
def test_a_pipeline_takes_p_minus_2_and_its_blocks(ranks, count):
    """Not p - 1 + n/b: the first block is under way in the first step already."""
    transfers = schedule("broadcast", PIPELINE, ranks, count, 1)
    assert steps(transfers) == play(transfers, Machine.uniform(ranks, UNIT), 1).seconds == ranks - 2 + count


def test_a_message_takes_equation_1():
    """alpha + beta n, and gamma n if it is added; n in bytes of four-byte elements."""
    machine = Machine.uniform(2, Link(1, 10, 100))
    assert play(schedule("broadcast", TREE, 2, 3), machine).seconds == 1 + 12 * 10
    assert play(schedule("reduce", TREE, 2, 3), machine).seconds == 1 + 12 * 110


def test_a_send_waits_for_what_arrives_in_its_span():
    """Rank 1 hands on one of eight elements once all that hold it are there, but one that is its own at once."""
    arriving, *sent = Transfer(0, 0, 1, 0, 8, False), Transfer(1, 1, 2, 6, 7, False), Transfer(1, 1, 3, 8, 9, False)
    machine = Machine.uniform(4, UNIT)
    assert [play((arriving, transfer), machine, 1).entries[1].start for transfer in sent] == [8, 0]


def test_half_duplex_serves_one_direction_at_a_time():
    """Two ranks of an allreduce: all one after another. A chain of three: the middle one takes in and hands on in turn."""
    full, half = (Machine.uniform(2, UNIT, duplex) for duplex in ("full", "half"))
    assert (seconds(full, "allreduce", RING, 2, 8), seconds(half, "allreduce", RING, 2, 8)) == (8, 16)
    assert (seconds(full, "allreduce", PIPELINE, 2, 8, 1), seconds(half, "allreduce", PIPELINE, 2, 8, 1)) == (9, 16)
    full, half = (Machine.uniform(3, UNIT, duplex) for duplex in ("full", "half"))
    assert (seconds(full, "broadcast", PIPELINE, 3, 8, 1), seconds(half, "broadcast", PIPELINE, 3, 8, 1)) == (9, 16)


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("gamma", [0, 2])
def test_a_mesh_keeps_both_neighbours_of_a_chain_busy(ranks, gamma):
    """The pipeline's allreduce fills both directions, 2 p - 3 + n/b steps, and two rings at once take half of one's time."""
    machine, link, count = Machine.uniform(ranks, Link(1, 1, gamma), "mesh"), Link(1, 1, gamma), 10
    chain = (ranks - 2 + count) * (2 + gamma) + (ranks - 1) * 2
    assert seconds(machine, "allreduce", PIPELINE, ranks, count, 1) == chain
    if ranks > 2:  # between two ranks both rings take the same link
        assert seconds(machine, "allreduce", TWO_WAY, ranks, 6 * ranks) == cost("allreduce", RING, ranks, 3 * ranks, link)


def test_two_sockets_share_their_bridge():
    """Four ranks, two a socket; an element within a socket takes 1 s, over the bridge 10 s, 8 elements."""
    machine = Machine.two_sockets(4, UNIT, Link(0, 10), first=2)
    # The tree crosses once, then both sockets go on by themselves.
    assert seconds(machine, "broadcast", TREE, 4, 8) == 80 + 8
    # Blocks of a chain cross one by one: the first block's way to the bridge and after it, and 8 crossings.
    assert seconds(machine, "broadcast", PIPELINE, 4, 8, 1) == 1 + 8 * 10 + 1
    # Exchange: 0 with 2 and 1 with 3 share the bridge, 4 elements each, first and last; halves of 2 within sockets.
    assert seconds(machine, "allreduce", EXCHANGE, 4, 8) == 2 * 40 + 2 + 2 + 2 * 40
    # The directions are apart: the ring crosses once in each.
    assert seconds(machine, "allreduce", RING, 4, 8) == 6 * 20
    # What crosses is added at the pace of its target, which is not the bridge's.
    assert seconds(Machine.two_sockets(2, Link(0, 1, 5), Link(0, 10, 1), first=1), "reduce", TREE, 2, 8) == 8 * 15


def test_a_chain_jumps_only_where_it_reaches_the_second_socket():
    """Figure 4's shape: level up to four GPUs, level from five on, a bridge's pace apart."""
    times = [seconds(Machine.two_sockets(p, UNIT, Link(0, 3)), "broadcast", PIPELINE, p, 1000, 1) for p in range(2, 9)]
    assert times == [1000, 1001, 1002, 3003, 3004, 3005, 3006]


def test_switches_delay_exchanges_but_no_chain():
    """Section 3.1, four ranks on two switches, 8 elements; one edge of the tree crosses, though the paper says it collides."""
    free, switches = Machine.uniform(4, UNIT), Machine.switches(4, UNIT, size=2)
    for collective in COLLECTIVES:
        for algorithm in (PIPELINE, RING, TREE):
            assert seconds(switches, collective, algorithm, 4, 8, 1) == seconds(free, collective, algorithm, 4, 8, 1)
    assert (seconds(free, "allreduce", EXCHANGE, 4, 8), seconds(switches, "allreduce", EXCHANGE, 4, 8)) == (12, 20)
    # Numbered across switches, two edges of the chain meet between them, with 8 blocks each.
    crossed = Machine(UNIT, UNIT, (0, 1, 0, 1))
    assert (seconds(free, "broadcast", PIPELINE, 4, 8, 1), seconds(crossed, "broadcast", PIPELINE, 4, 8, 1)) == (10, 16)


def test_overlapped_reduction_frees_the_link():
    """Two ranks, five blocks, 2 s each to arrive: adding in 1 s is hidden but for the last block's; in 3 s it sets the pace."""
    for gamma, apart, overlapped in ((1, 5 * 3, 5 * 2 + 1), (3, 5 * 5, 2 + 5 * 3)):
        machine = Machine.uniform(2, Link(1, 1, gamma))
        assert seconds(machine, "reduce", PIPELINE, 2, 5, 1) == apart
        assert seconds(machine, "reduce", PIPELINE, 2, 5, 1, overlapped_reduce=True) == overlapped


@pytest.mark.parametrize("duplex", DUPLEX)
def test_no_part_of_a_machine_carries_two_messages(duplex):
    """Whatever the constants, transfers that share a part of their paths follow each other."""
    link = Link(1.1e-6, 3e-10, 7e-11)
    machine = Machine(link, Link(2e-6, 5e-10), (0, 0, 0, 1, 1, 2), duplex)
    for algorithm in ALGORITHMS:
        intervals = defaultdict(list)
        for t, start, end in play(schedule("allreduce", algorithm, 6, 1000, 100), machine).entries:
            for part in machine.path(t.source, t.target)[1]:
                intervals[part].append((start, end))
        for times in intervals.values():
            times.sort()
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))


def test_equal_times_are_equal_in_any_order_of_summation():
    """0.1 + 0.2 and 0.3 differ as floats; ticks do not, so that the exchange of 8 ranks stays in step."""
    link = Link(0.1, 0.2, 0.3)
    entries = play(schedule("allreduce", EXCHANGE, 8, 56), Machine.uniform(8, link), 1).entries
    assert len({entry.start for entry in entries}) == 6


def test_a_hundred_thousand_transfers():
    """A ring of 256 nodes, in a second or two, exactly as long as the formula."""
    link, transfers = Link(1e-5, 1e-9, 1e-10), schedule("allreduce", RING, 256, 256 * 10)
    assert len(transfers) == 2 * 255 * 256
    expected = cost("allreduce", RING, 256, 4 * 256 * 10, link)
    assert play(transfers, Machine.uniform(256, link)).seconds == pytest.approx(expected, rel=1e-12)


def test_nothing_to_send_takes_no_time():
    assert play((), Machine.uniform(1, UNIT)).seconds == 0
    assert play(schedule("broadcast", PIPELINE, 3, 5, 1), Machine.uniform(3, Link(0, 0))).seconds == 0


def test_bad_machines_are_told():
    with pytest.raises(ReproError, match="machine of 3 ranks"):
        play(schedule("reduce", RING, 4, 8), Machine.uniform(3, UNIT))
    with pytest.raises(ReproError, match="unknown duplex 'simplex': choose one of full, half, mesh"):
        Machine.uniform(4, UNIT, "simplex")
    with pytest.raises(ReproError, match="without ranks"):
        Machine.uniform(0, UNIT)
