"""What the paper's own numbers say of each other: the quantities of `data/papers/wang2017.toml` that need no run.

Definitions stand there, beside the ranges. All numbers of the paper are read from `data/papers/wang2017.csv`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import NamedTuple

from repro.collectives.costs import PRINTED_ALGORITHMS, Link, best_block, cost, limit, printed_cost
from repro.collectives.schedules import COLLECTIVES, figure2_allreduce, schedule, steps
from repro.collectives.simulator import Machine, play
from repro.report.published import published_value

STUDY = "wang2017"
LP, MST, BE = PRINTED_ALGORITHMS
ROOTED = ("broadcast", "reduce")
KILO, MEGA = 1024, 10**6  # of bytes; so read, the paper's message has the derived number of blocks
MODELS = ("AlexNet", "GoogLeNet")
VARIANTS = ("overlap", "broadcast and reduce", "allreduce")  # of synchronous SGD, sections 3.3 and 4.2
BYTES_ONLY = Link(0.0, 1.0)

# Ours, where the paper has no number.
_MANY = 10**6  # ranks, for which 2 (p - 1) / p is 2 to six digits
_CLUSTER = 256  # ranks
_PARTS = 64  # of a message that is simulated behind switches
_SWITCH = 2  # ranks behind a switch
_BRIDGE = 2  # times slower than a link is the bridge between sockets
_LAYERS = 8  # of the model on which the listing is played; the result is the same for any number from 1


class Rounded(NamedTuple):
    """A number computed from printed ones, and the interval that their rounding allows."""

    value: float
    low: float
    high: float


class Row(NamedTuple):
    """One statement of the paper: its printed number, the same number computed from others, and from which."""

    statement: str
    printed: float
    recomputed: float
    note: str


def printed(exhibit: str, series: str, metric: str, x: float | None = None) -> float:
    """One number of `data/papers/wang2017.csv`."""
    return published_value(STUDY, exhibit, series, metric, x).value


def paper_link() -> Link:
    """The constants that section 3.2 assumes for PCIe; gamma is dropped there."""
    return Link(printed("table1", "constants", "alpha_seconds"), printed("table1", "constants", "beta_seconds_per_byte"))


def paper_block() -> int:
    """Bytes of the paper's block."""
    return round(printed("table1", "constants", "block_kilobytes") * KILO)


def paper_message() -> int:
    """Bytes of the message of Figure 4."""
    return round(printed("figure4", "set-up", "message_megabytes") * MEGA)


def paper_ranks() -> int:
    """GPUs of Figure 3."""
    return round(printed("figure3", "set-up", "devices"))


def _ends(exhibit: str, series: str) -> tuple[int, int]:
    """The smallest and the largest number of GPUs that a statement names."""
    return round(printed(exhibit, series, "devices_low")), round(printed(exhibit, series, "devices_high"))


def rounding(value: float) -> tuple[float, float]:
    """The numbers that are printed as `value`: half a unit of its last digit to either side."""
    half = 10.0 ** Decimal(f"{value:g}").as_tuple().exponent / 2
    return value - half, value + half


# ---------------------------------------------------------------------------------------------------------- cost model


def equation2(ranks: int) -> float:
    """T_BE / T_LP of a broadcast or reduce, Equation 2, at the paper's block and message."""
    return 2 * (1 - 1 / ranks) / (1 + paper_block() / paper_message() * (ranks - 1))


def equation3(ranks: int, nbytes: float) -> float:
    """T_MST / T_LP of a broadcast or reduce, Equation 3, at the paper's block."""
    return math.log2(ranks) / (paper_block() * (ranks - 1) / nbytes + 1)


def lp_growth(collective: str, few: int, many: int) -> float:
    """Printed cost of LP over `many` ranks over that over `few`: the paper's constants, block and message."""
    small, large = (printed_cost(collective, LP, p, paper_message(), paper_link(), paper_block()) for p in (few, many))
    return large / small


def be_growth(few: int, many: int) -> float:
    """The same of a BE broadcast, in the limit of long messages."""
    small, large = (printed_cost("broadcast", BE, p, 1, BYTES_ONLY) for p in (few, many))
    return large / small


def best_block_kilobytes(ranks: int, megabytes: float) -> float:
    """b* of a message of so many MB by the paper's alpha and beta, in KB."""
    return best_block(round(megabytes * MEGA), ranks, paper_link()) / KILO


def block_over_best(link: Link) -> float:
    """Printed cost of an LP broadcast of the paper's message in the paper's blocks over that in blocks of b*."""
    nbytes, ranks = paper_message(), paper_ranks()
    blocks = paper_block(), best_block(nbytes, ranks, link)
    chosen, best = (printed_cost("broadcast", LP, ranks, nbytes, link, block) for block in blocks)
    return chosen / best


def mst_be_switch_kilobytes() -> float:
    """Both costs are a + c n; they are equal at (a_BE - a_MST) / (c_MST - c_BE)."""

    def line(algorithm: str) -> tuple[float, float]:
        links = Link(paper_link().alpha, 0.0), Link(0.0, paper_link().beta)
        return tuple(printed_cost("broadcast", algorithm, paper_ranks(), 1, link) for link in links)

    (be_starts, be_byte), (mst_starts, mst_byte) = line(BE), line(MST)
    return (be_starts - mst_starts) / (mst_byte - be_byte) / KILO


def lp_over_lower_bound(collective: str) -> float:
    """Printed cost of LP, for long messages, over the bytes that some rank has to receive through its one port."""
    ranks = paper_ranks()
    bound = cost("allreduce", "ring", ranks, 1, BYTES_ONLY) if collective == "allreduce" else 1
    return printed_cost(collective, BE, ranks, 1, BYTES_ONLY) / limit(collective, BE, ranks) / bound


def printed_over_theory(series: str, collective: str) -> float:
    """A factor of Figure 3 over the limit that the printed costs have for it."""
    algorithm = {"LP over BE": BE, "LP over MST": MST}[series]
    return printed("figure3", series, f"{collective}_speedup") / limit(collective, algorithm, paper_ranks())


# ------------------------------------------------------------------------------------------- schedules, played or simulated


def _figure2() -> tuple[int, int]:
    """Ranks and blocks of Figure 2."""
    return round(printed("figure2", "example", "devices")), round(printed("figure2", "example", "blocks"))


def lp_steps(collective: str) -> int:
    """Steps of LP's schedule in the example of Figure 2."""
    return steps(schedule(collective, LP, *_figure2(), block=1))


def figure2_first_spread_step() -> int:
    """Rank 0 sends its own blocks to be added, finished ones to replace the target's."""
    return 1 + min(t.step for t in figure2_allreduce(*_figure2()) if t.source == 0 and not t.reduce)


def printed_allreduce_steps() -> float:
    ranks, blocks = _figure2()
    return printed_cost("allreduce", LP, ranks, blocks, Link(1.0, 0.0), 1)


def busiest_rank_sends(algorithm: str) -> int:
    """Parts, of which a message has one a rank, that the busiest rank of an allreduce sends."""
    ranks = paper_ranks()
    sent = [0] * ranks
    for transfer in schedule("allreduce", algorithm, ranks, ranks):
        sent[transfer.source] += transfer.stop - transfer.start
    return max(sent)


def mst_numbers_of_steps_that_differ() -> int:
    few, many = _ends("figure4", "set-up")
    counts = {ranks: steps(schedule("broadcast", MST, ranks, 1)) for ranks in range(few, many + 1)}
    return sum(count != printed("figure4", "MST", "steps", ranks) for ranks, count in counts.items())


def listing_layers(layers: int) -> tuple[set[int], set[int]]:
    """Layers that the listing of the overlapped SGD (section 3.3) broadcasts, and those whose gradients it reduces.

    It counts from 0 to max_layers, the last of `layers`; both loops are over i, and take layer i + 1.
    """
    last = layers - 1
    return {0} | {i + 1 for i in range(last + 1)}, {i + 1 for i in reversed(range(last))}


def listing_layers_not_reduced() -> int:
    return len(set(range(_LAYERS)) - listing_layers(_LAYERS)[1])


def listing_layers_that_do_not_exist() -> int:
    return len(listing_layers(_LAYERS)[0] - set(range(_LAYERS)))


def collision(collective: str, algorithm: str) -> float:
    """Simulated time behind small switches, each with one port in and one out, over that behind one that never blocks."""
    ranks, link = round(printed("table1", "machine", "devices_high")), paper_link()
    transfers = schedule(collective, algorithm, ranks, _PARTS, block=1)
    machines = Machine.switches(ranks, link, _SWITCH), Machine.uniform(ranks, link)
    crowded, free = (play(transfers, machine, round(paper_message() / _PARTS)).seconds for machine in machines)
    return crowded / free


def two_socket_seconds(ranks: int) -> float:
    """Simulated LP broadcast of the paper's message over GPUs on two sockets, whose bridge is slower than a link."""
    link, block = paper_link(), paper_block()
    first = round(printed("figure4", "LP", "last_device_before_jump"))
    machine = Machine.two_sockets(ranks, link, Link(_BRIDGE * link.alpha, _BRIDGE * link.beta), first)
    return play(schedule("broadcast", LP, ranks, round(paper_message() / block), block=1), machine, block).seconds


def lp_bridge_jump() -> float:
    ends = (round(printed("figure4", "LP", f"{end}_jump")) for end in ("last_device_before", "first_device_after"))
    before, after = map(two_socket_seconds, ends)
    return after / before


def lp_change_away_from_bridge() -> float:
    few, many = _ends("figure4", "set-up")
    seconds = {ranks: two_socket_seconds(ranks) for ranks in range(few, many + 1)}
    jump = printed("figure4", "LP", "first_device_after_jump")
    return max(seconds[p] / seconds[p - 1] for p in range(few + 1, many + 1) if p != jump)


# ------------------------------------------------------------------------------------------------------ printed numbers


def factors_over_open_mpi() -> list[float]:
    """Of the three collectives, in the text on Figure 3."""
    return [printed("figure3", "LP over BE", f"{collective}_speedup") for collective in COLLECTIVES]


def _speedup(model: str, series: str) -> float:
    return printed("figure5", series, f"{model.lower()}_speedup")


def _percent(model: str, series: str) -> float:
    return printed("table2", series, f"{model.lower()}_communication_percent")


def communication(speedup: float, percent: float) -> float:
    """Communication over computation, c, of a system than which another one is `speedup` times faster.

    The other one communicates for `percent` of this one's time and computes for as long: (1 + c) / (1 + percent c / 100) is the
    speed-up, if an iteration takes the sum of both.
    """
    return (speedup - 1) / (1 - speedup * percent / 100)


def be_communication(model: str) -> Rounded:
    """Communication over computation of BE-Alg.1, from LP-Alg.1's speed-up over it and share of its communication."""
    speedup, percent = (number(model, "LP-Alg.1 over BE-Alg.1") for number in (_speedup, _percent))
    ends = map(communication, rounding(speedup), rounding(percent))  # it grows with both
    return Rounded(communication(speedup, percent), *ends)


def lp_communication(model: str) -> Rounded:
    """Communication over computation of LP-Alg.1."""
    percent = _percent(model, "LP-Alg.1 over BE-Alg.1")
    shares = percent, *rounding(percent)
    return Rounded(*(share / 100 * c for share, c in zip(shares, be_communication(model), strict=True)))


def best_overlap_gain(model: str, over: str) -> Rounded:
    """Largest speed-up over "BE-Alg.1" or "LP-Alg.1": all communication hides behind computation."""
    return Rounded(*(1 + c for c in {"BE-Alg.1": be_communication, "LP-Alg.1": lp_communication}[over](model)))


def printed_overlap_gain(model: str, over: str) -> float:
    """The speed-up of LP-Overlap-Alg.3 over "BE-Alg.1" or "LP-Alg.1"."""
    base = 1 if over == "BE-Alg.1" else _speedup(model, f"{over} over BE-Alg.1")
    return _speedup(model, "LP-Overlap-Alg.3 over BE-Alg.1") / base


def lp_over_mst(model: str) -> Rounded:
    """LP-Alg.1's speed-up over MST-Alg.1, from the share of its communication and `lp_communication`."""
    percent = _percent(model, "LP-Alg.1 over MST-Alg.1")
    low, high = rounding(percent)
    # It grows with LP's communication and shrinks with the share.
    pairs = zip(lp_communication(model), (percent, high, low), strict=True)
    return Rounded(*((1 + 100 * lp / share) / (1 + lp) for lp, share in pairs))


def lp_over_mst_nearest(model: str) -> float:
    _, low, high = lp_over_mst(model)
    return min(max(_speedup(model, "LP-Alg.1 over MST-Alg.1"), low), high)


def algorithms_with_two_numbers() -> int:
    sections = ("number_in_section_3_3", "number_in_section_4_2")
    return sum(len({printed("audit", algorithm, section) for section in sections}) > 1 for algorithm in VARIANTS)


# Name of the quantity -> its value, for the exact claims.
EXACT: dict[str, Callable[[], float]] = {
    "be_over_lp_limit_many_ranks": lambda: min(limit(collective, BE, _MANY) for collective in ROOTED),
    "broadcast_be_over_lp_limit": lambda: limit("broadcast", BE, paper_ranks()),
    "allreduce_be_over_lp_limit": lambda: limit("allreduce", BE, paper_ranks()),
    "mst_over_lp_limit_smallest": lambda: min(limit(collective, MST, paper_ranks()) for collective in COLLECTIVES),
    "eq3_ratio_at_12_kilobytes": lambda: equation3(paper_ranks(), printed("table1", "MPI", "tree_below_kilobytes") * KILO),
    "lp_broadcast_8_over_2": lambda: lp_growth("broadcast", *_ends("table1", "LP broadcast")),
    "lp_20_over_2_largest": lambda: max(lp_growth(name, *_ends("table1", "LP, introduction")) for name in COLLECTIVES),
    "lp_broadcast_256_over_2": lambda: lp_growth("broadcast", _ends("table1", "LP broadcast")[0], _CLUSTER),
    "be_broadcast_limit_6_over_2": lambda: be_growth(*_ends("figure4", "set-up")),
    "block_64_kilobytes_over_best": lambda: block_over_best(paper_link()),
    "block_64_kilobytes_over_best_slow_start": lambda: block_over_best(
        Link(printed("table1", "constants, sockets", "alpha_seconds"), paper_link().beta)
    ),
    "start_up_percent": lambda: 100 * paper_link().alpha / paper_block() / paper_link().beta,
    "mst_be_switch_kilobytes": mst_be_switch_kilobytes,
    "alexnet_megabytes": lambda: printed("table1", "AlexNet", "parameters") * 4 / MEGA,
    "broadcast_lp_over_lower_bound": lambda: lp_over_lower_bound("broadcast"),
    "allreduce_lp_over_lower_bound": lambda: lp_over_lower_bound("allreduce"),
    "pipeline_steps": lambda: max(map(lp_steps, ROOTED)),
    "broadcast_and_reduce_steps": lambda: sum(map(lp_steps, ROOTED)),
    "figure2_allreduce_steps": lambda: steps(figure2_allreduce(*_figure2())),
    "figure2_first_spread_step": figure2_first_spread_step,
    "printed_allreduce_steps": printed_allreduce_steps,
    "lp_over_ring_busiest_rank_bytes": lambda: busiest_rank_sends(LP) / busiest_rank_sends("ring"),
    "mst_numbers_of_steps_that_differ": mst_numbers_of_steps_that_differ,
    "listing_layers_not_reduced": listing_layers_not_reduced,
    "listing_layers_that_do_not_exist": listing_layers_that_do_not_exist,
    "lp_collision_largest": lambda: max(collision(collective, LP) for collective in COLLECTIVES),
    "be_collision_smallest": lambda: min(collision(collective, BE) for collective in COLLECTIVES),
    "mst_collision_smallest": lambda: min(collision(collective, MST) for collective in COLLECTIVES),
    "lp_bridge_jump": lp_bridge_jump,
    "lp_change_away_from_bridge": lp_change_away_from_bridge,
    "broadcast_mst_over_lp_printed_over_theory": lambda: printed_over_theory("LP over MST", "broadcast"),
    "be_over_lp_printed_over_theory_smallest": lambda: min(printed_over_theory("LP over BE", name) for name in COLLECTIVES),
    "mst_over_lp_printed_over_theory_smallest": lambda: min(
        printed_over_theory("LP over MST", collective) for collective in ("reduce", "allreduce")
    ),
    "smallest_printed_factor_over_open_mpi": lambda: min(factors_over_open_mpi()),
    "largest_printed_factor_over_open_mpi": lambda: max(factors_over_open_mpi()),
    "devices_of_figure3": paper_ranks,
    "googlenet_printed_speedup_over_mst": lambda: _speedup("GoogLeNet", "LP-Alg.1 over MST-Alg.1"),
    "alexnet_best_overlap_gain": lambda: best_overlap_gain("AlexNet", "BE-Alg.1").high,
    "googlenet_best_overlap_gain": lambda: best_overlap_gain("GoogLeNet", "BE-Alg.1").high,
    "googlenet_printed_overlap_gain": lambda: printed_overlap_gain("GoogLeNet", "LP-Alg.1"),
    "alexnet_lp_over_mst_nearest": lambda: lp_over_mst_nearest("AlexNet"),
    "googlenet_lp_over_mst_nearest": lambda: lp_over_mst_nearest("GoogLeNet"),
    "algorithms_with_two_numbers": algorithms_with_two_numbers,
}


# --------------------------------------------------------------------------------------------------------------- audit


def paper_arithmetic() -> list[Row]:
    """The statements that other printed numbers check: those of section 3, of section 4, of the abstract."""
    return [Row(*cells) for cells in (*_cost_rows(), *_step_rows(), *_factor_rows(), *_training_rows(), *_abstract_rows())]


def _cost_rows() -> Iterable[tuple]:
    ranks, message = paper_ranks(), printed("figure4", "set-up", "message_megabytes")
    alexnet, block = printed("table1", "AlexNet", "megabytes"), printed("table1", "constants", "block_kilobytes")
    about, twice = printed("table1", "LP over BE", "speedup", ranks), printed("table1", "LP over BE", "speedup_high")
    same = f"printed as the same; {block:g} KB, {message:g} MB (remembered)"
    yield f"BE over LP, broadcast, {ranks} GPUs", about, limit("broadcast", BE, ranks), "limit of the costs: 2 (p - 1) / p"
    yield f"BE over LP, allreduce, {ranks} GPUs", twice, limit("allreduce", BE, ranks), "limit of the costs: (p - 1) / p"
    yield "BE broadcast, 6 GPUs over 2", 1, EXACT["be_broadcast_limit_6_over_2"](), "printed as the same; limit of the costs"
    yield "LP broadcast, 8 GPUs over 2", 1, EXACT["lp_broadcast_8_over_2"](), same
    yield "LP, 20 GPUs over 2", 1, EXACT["lp_20_over_2_largest"](), same
    for size, devices in ((message, ranks), (message, _ends("figure4", "set-up")[1]), (alexnet, ranks)):
        best = best_block_kilobytes(devices, size)
        yield f"block, KB, for {size:g} MB and {devices} GPUs", block, best, "b* = sqrt(n alpha / ((p - 1) beta))"
    rate, switch = printed("table1", "constants", "bytes_per_second"), printed("table1", "MPI", "tree_below_kilobytes")
    yield "beta", rate, paper_link().beta, "printed in bytes per second; Equation 1 needs seconds per byte"
    yield (
        "MST beats BE below, KB",
        switch,
        mst_be_switch_kilobytes(),
        "printed is MPI's switch; the paper's constants and costs",
    )
    yield "AlexNet, MB", alexnet, EXACT["alexnet_megabytes"](), "4 bytes a parameter, whose number is remembered"
    yield "AlexNet, MB, in section 4", alexnet, printed("table2", "AlexNet", "megabytes"), "remembered"


def _step_rows() -> Iterable[tuple]:
    one, ring = (printed("figure2", series, "steps") for series in ("one collective, Table 1", "allreduce"))
    yield "steps of a broadcast or reduce", one, lp_steps("broadcast"), "Table 1: p - 1 + n/b; Figure 2, played: p - 2 + n/b"
    yield "steps of the allreduce", ring, EXACT["figure2_allreduce_steps"](), "Figure 2c, played on a ring 0-1-2-0"
    yield "steps of the allreduce, chain", ring, lp_steps("allreduce"), "along the chain and back, both directions in use"
    yield "steps of the allreduce, Table 1", ring, printed_allreduce_steps(), "2 (p - 1 + n/b)"


def _factor_rows() -> Iterable[tuple]:
    for series, algorithm in (("LP over BE", BE), ("LP over MST", MST)):
        for collective in COLLECTIVES:
            factor = printed("figure3", series, f"{collective}_speedup")
            yield f"{series}, {collective}", factor, limit(collective, algorithm, paper_ranks()), "limit of the costs"


def _training_rows() -> Iterable[tuple]:
    for model in MODELS:
        gains = [
            (f"overlap over {base}, at most", printed_overlap_gain(model, base), best_overlap_gain(model, base))
            for base in ("BE-Alg.1", "LP-Alg.1")
        ]
        tree = ("LP-Alg.1 over MST-Alg.1", _speedup(model, "LP-Alg.1 over MST-Alg.1"), lp_over_mst(model))
        for what, claimed, (value, low, high) in (*gains, tree):
            yield f"{model}, {what}", claimed, value, f"Table 2 and Figure 5; their rounding allows {low:.2f} to {high:.2f}"
        least = min(printed("figure3", "LP over BE", f"{collective}_speedup") for collective in ROOTED)
        times = 100 / _percent(model, "LP-Alg.1 over BE-Alg.1")
        yield (
            f"{model}, communication of BE over LP",
            least,
            times,
            "smaller factor of broadcast and reduce in Figure 3; Table 2",
        )
    alike = len(VARIANTS) - algorithms_with_two_numbers()
    yield "algorithms with one number", len(VARIANTS), alike, "sections 3.3 and 4.2"


def _abstract_rows() -> Iterable[tuple]:
    least, devices = (printed("prose", "LP over Open MPI", metric) for metric in ("speedup_low", "devices"))
    named = printed("prose", "LP over MST Caffe", "googlenet_speedup")
    yield "smallest factor over Open MPI", least, min(factors_over_open_mpi()), "Figure 3; the abstract's is over Caffe's MST"
    yield "GPUs of these factors", devices, paper_ranks(), "section 4.1"
    tree = _speedup("GoogLeNet", "LP-Alg.1 over MST-Alg.1")
    yield "GoogLeNet, over MST Caffe", named, tree, "Figure 5; the abstract's is AlexNet's"
