"""Several hosts emulated on one Linux machine: network namespaces joined to one switch by links of a given rate.

Every host is a namespace with one interface, the far end of a virtual cable to a bridge, the switch, which has a namespace of
its own: nothing is added to the machine's network. A token bucket filter (`tc-tbf`) at either end of a cable limits each of its
directions, so that links are full duplex and a receiver's link is shared by those who send to it.
"""

import ctypes
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

from repro.errors import ReproError

INTERFACE = "wire"
_SWITCH = "switch"
_NAMESPACES = Path("/var/run/netns")
_NAME = re.compile(r"repro-(?P<process>\d+)-[0-9a-f]{8}-\w+")
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_MOST_HOSTS = 250

# Of a full frame of 9014 bytes 8948 are payload, 99 %; at the usual 1514 bytes it would be 95 %.
_MTU = 9000
# What a link that was idle lets through at once: as little as timers and the scheduler allow without gaps in the flow.
_BURST_SECONDS, _SMALLEST_BURST = 0.001, 32 << 10
# Bytes of each sender that a queue holds: more than TCP's window, so that nothing is ever dropped.
_WINDOW = 8 << 20


class Hosts:
    """`count` hosts on links of `rate` bytes/s in each direction, for as long as the `with` block lasts.

    A message of n bytes takes some 1.01 n / rate; up to two bursts less where links were idle before, of 1 ms or 32 KiB each,
    whichever is more. The latency is that of the machine's own loopback. Rates up to 100 MB/s are kept well on two cores;
    beyond, the machine itself becomes the limit. The first large messages of a process group take some 10 % longer.

    Raises `ReproError` where hosts cannot be emulated (`why_not`). What a killed process left behind is deleted on entry.
    """

    def __init__(self, count: int, rate: float):
        if not 1 <= count <= _MOST_HOSTS:
            raise ReproError(f"count is {count}: 1 to {_MOST_HOSTS} hosts can be emulated")
        if not rate > 0:
            raise ReproError(f"rate is {rate}: it must be a positive number of bytes per second")
        self.count = count
        self.rate = rate
        self._prefix = f"repro-{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> "Hosts":
        if sys.platform != "linux":
            raise ReproError(f"hosts are emulated by namespaces of the Linux kernel, and this is {sys.platform}")
        try:
            _delete(_stale())
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        _delete(name for name in _existing() if name.startswith(self._prefix))

    def enter(self, index: int) -> str:
        """Move this thread, and those it starts, into host `index`; the interface that process groups must use there.

        Sockets opened before stay where they were: to be called before a process group is initialised.
        """
        if not 0 <= index < self.count:
            raise ReproError(f"there is no host {index}: the {self.count} hosts are counted from 0")
        try:
            descriptor = os.open(_NAMESPACES / self._name(index), os.O_RDONLY)
        except FileNotFoundError as error:
            raise ReproError(f"host {index} does not exist: hosts can be entered only within their `with` block") from error
        try:
            # os.setns came with Python 3.12.
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
                raise ReproError(f"host {index} cannot be entered: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(descriptor)
        return INTERFACE

    def _name(self, host: int | str) -> str:
        return f"{self._prefix}-{host}"

    def _build(self) -> None:
        switch = self._name(_SWITCH)
        _call(f"ip netns add {switch}")
        _call(f"ip -n {switch} link add {_SWITCH} up mtu {_MTU} type bridge")
        for index in range(self.count):
            host, port = self._name(index), f"port{index}"
            _call(f"ip netns add {host}")
            _call(f"ip -n {switch} link add {port} mtu {_MTU} type veth peer name {INTERFACE} mtu {_MTU} netns {host}")
            _call(f"ip -n {switch} link set {port} up master {_SWITCH}")
            _call(f"ip -n {host} address add 10.0.0.{index + 1}/24 dev {INTERFACE} noprefixroute")
            _call(f"ip -n {host} link set {INTERFACE} up")
            # Reno fills a queue that drops nothing; BBR, some machines' default, would pause for 0.2 s every ten to probe it.
            _call(f"ip -n {host} route add 10.0.0.0/24 dev {INTERFACE} congctl reno initcwnd 1000 initrwnd 1000")
            self._limit(host, INTERFACE)
            self._limit(switch, port)

    def _limit(self, namespace: str, interface: str) -> None:
        """Limit what the interface sends."""
        burst = max(_SMALLEST_BURST, round(self.rate * _BURST_SECONDS))
        bits, queue = round(8 * self.rate), self.count * _WINDOW
        _call(f"tc -n {namespace} qdisc add dev {interface} root tbf rate {bits}bit burst {burst} limit {queue}")


def why_not() -> str | None:
    """Why hosts cannot be emulated here, found by trying; None where they can."""
    try:
        with Hosts(1, rate=1e6):
            return None
    except ReproError as reason:
        return str(reason)


def _existing() -> list[str]:
    """The namespaces of all processes' hosts."""
    names = os.listdir(_NAMESPACES) if _NAMESPACES.exists() else []
    return [name for name in names if _NAME.fullmatch(name)]


def _stale() -> list[str]:
    """The namespaces of processes that are no more."""
    return [name for name in _existing() if not Path("/proc", _NAME.fullmatch(name)["process"]).exists()]


def _delete(names) -> None:
    for name in names:
        try:
            done = subprocess.run(["ip", "netns", "delete", name], capture_output=True, text=True)
        except OSError as error:
            raise ReproError(f"namespace {name} cannot be deleted without the program ip: {error.strerror}") from error
        # Another process may be deleting the same stale hosts.
        if (_NAMESPACES / name).exists():
            raise ReproError(f"namespace {name} cannot be deleted: {done.stderr.strip()}")


def _call(command: str) -> None:
    """Run a program on its words; `ReproError` with what it said if that fails."""
    program, *arguments = command.split()
    try:
        subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    except OSError as error:
        raise ReproError(f"hosts cannot be emulated without the program {program} (iproute2): {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().partition("\n")[0]
        raise ReproError(f"hosts cannot be emulated: `{command}` failed: {reason}") from error
