"""Emulated hosts: a message takes its bytes over the link's rate, links are full duplex, and a receiver's link is shared."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from repro.collectives import hosts as module
from repro.collectives.hosts import INTERFACE, Hosts, why_not
from repro.collectives.launch import run_ranks
from repro.errors import ReproError

RATE = 50e6
MESSAGE = 16 << 20
TRANSFERS = {
    "one way": [(0, 1)],
    "both ways": [(0, 1), (1, 0)],
    "two to one": [(0, 2), (1, 2)],
    "one to two": [(2, 0), (2, 1)],
}
REPEATS = 2
KILLED = "from repro.collectives.hosts import Hosts\nwith Hosts(2, 1e6) as h: print(h._prefix, flush=True); input()"


@pytest.fixture(scope="module")
def permitted():
    """For tests that need the real thing."""
    if reason := why_not():
        pytest.skip(reason)


def interfaces() -> set[str]:
    """The network interfaces that the calling thread sees."""
    return {name for _, name in socket.if_nameindex()}


def of(prefix: str) -> list[str]:
    return [name for name in module._existing() if name.startswith(prefix)]


def timed(messages: list[tuple[int, int]]) -> float:
    """Seconds until all of this rank's messages (source, target), sent at once, have come and gone."""
    rank = dist.get_rank()
    outgoing = [(torch.ones(MESSAGE // 4), target) for source, target in messages if source == rank]
    incoming = [(torch.zeros(MESSAGE // 4), source) for source, target in messages if target == rank]
    dist.barrier()
    start = time.perf_counter()
    works = [dist.irecv(message, source) for message, source in incoming]
    works += [dist.isend(message, target) for message, target in outgoing]
    for work in works:
        work.wait()
    seconds = time.perf_counter() - start
    assert all(message.sum() == message.numel() for message, _ in incoming)
    return seconds


def all_timed() -> tuple[set[str], dict[str, list[float]]]:
    """The rank's interfaces and its times by name of the transfer."""
    return interfaces(), {name: [timed(messages) for _ in range(REPEATS)] for name, messages in TRANSFERS.items()}


@pytest.fixture(scope="module")
def ranks(permitted):
    """What three ranks on three hosts measured."""
    with Hosts(3, RATE) as hosts:
        return run_ranks(all_timed, 3, hosts=hosts, timeout=20)


def duration(ranks, transfer: str) -> float:
    """Time until the last rank is done, over that of one message's bytes at the link's rate; the fastest of the repeats."""
    slowest = np.max([seconds[transfer] for _, seconds in ranks], axis=0)
    return float(slowest.min() * RATE / MESSAGE)


# The faster of two took 1.005 to 1.02, 1.01 to 1.04 and 2.01 to 2.03 message times on two busy cores.
def test_a_message_takes_its_bytes_over_the_rate(ranks):
    assert 0.98 < duration(ranks, "one way") < 1.15


def test_links_are_full_duplex(ranks):
    """Messages in both directions at once take no longer than one."""
    assert 0.98 < duration(ranks, "both ways") < 1.15


@pytest.mark.parametrize("transfer", ["two to one", "one to two"])
def test_messages_in_one_direction_share_the_link(ranks, transfer):
    """That of their receiver, and that of their sender."""
    assert 1.96 < duration(ranks, transfer) < 2.3


def test_each_rank_has_a_host_of_its_own(ranks):
    for seen, _ in ranks:
        assert seen == {"lo", INTERFACE}


def test_a_thread_enters_a_host_without_the_others(permitted):
    """The machine's own network keeps its interfaces, and hosts are gone with their block."""
    before, seen = interfaces(), []
    with Hosts(2, RATE) as hosts:
        assert len(of(hosts._prefix)) == 3
        thread = threading.Thread(target=lambda: seen.append((hosts.enter(1), interfaces())))
        thread.start()
        thread.join()
        assert interfaces() == before
    assert seen == [(INTERFACE, {"lo", INTERFACE})]
    assert of(hosts._prefix) == [] and interfaces() == before


def test_hosts_are_deleted_after_an_exception(permitted):
    hosts = Hosts(2, RATE)
    with pytest.raises(ZeroDivisionError), hosts:
        raise ZeroDivisionError
    assert of(hosts._prefix) == []


def test_half_built_hosts_are_deleted(permitted, monkeypatch):
    """A limit that `tc` refuses leaves no namespace behind, and the error quotes it."""
    hosts = Hosts(2, rate=1.0)
    monkeypatch.setattr(module, "_SMALLEST_BURST", 0)
    with pytest.raises(ReproError, match=r"`tc -n repro-\S+ qdisc add .*` failed: "), hosts:
        pass
    assert of(hosts._prefix) == []


def test_hosts_of_a_killed_process_are_deleted_at_the_next_start(permitted):
    """Those of living processes are kept."""
    with Hosts(1, RATE) as living:
        killed = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with killed:
            stale = killed.stdout.readline().strip()
            assert len(of(stale)) == 3
            killed.send_signal(signal.SIGKILL)
        assert len(of(stale)) == 3
        with Hosts(1, RATE):
            assert of(stale) == [] and len(of(living._prefix)) == 2


def test_only_hosts_that_exist_are_entered():
    hosts = Hosts(2, RATE)
    with pytest.raises(ReproError, match="no host 2: the 2 hosts are counted from 0"):
        hosts.enter(2)
    with pytest.raises(ReproError, match=r"host 1 does not exist: .* within their `with` block"):
        hosts.enter(1)


@pytest.mark.parametrize("count, rate, message", [(0, 1e6, "1 to 250 hosts"), (251, 1e6, "1 to 250"), (2, 0.0, "rate is 0.0")])
def test_impossible_numbers_are_refused(count, rate, message):
    with pytest.raises(ReproError, match=message):
        Hosts(count, rate)


def test_the_reason_names_a_missing_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert "without the program ip (iproute2)" in why_not()


def test_the_reason_names_another_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert why_not().endswith("this is darwin")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can call programs as another user")
def test_the_reason_quotes_a_refusal(monkeypatch):
    """Programs are called as a user who may not make namespaces."""
    as_nobody = partial(subprocess.run, user=65534, group=65534, extra_groups=[])
    monkeypatch.setattr(module.subprocess, "run", as_nobody)
    assert re.search(r"`ip netns add \S+` failed: .*[Pp]ermi", why_not())
