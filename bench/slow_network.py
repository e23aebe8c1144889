"""Two network namespaces of Linux, and between them a slow link that loses frames.

    with slow_network(delay=0.02, loss=0.01) as (one, other, link):
        subprocess.run([*one.enter, "ping", "-c3", other.address])

Each namespace has one device, the end of a veth pair whose other end is in the namespace of this
process. A thread copies each frame from one pair to the other after `delay` seconds, or drops it
with a chance of `loss`. This takes root, and no module of the kernel beyond veth.
"""

import heapq
import os
import random
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ALL_PROTOCOLS, OUTGOING = 3, 4  # ETH_P_ALL, PACKET_OUTGOING of linux/if_ether.h, if_packet.h
SOL_PACKET, VNET_HDR = 263, 15  # with the header of virtio, frames keep what offloading needs
LARGEST = 1 << 17


def why_not() -> str | None:
    """Why this machine cannot make such a network; None if it can."""
    if not hasattr(socket, "AF_PACKET") or shutil.which("ip") is None:
        return "it needs Linux and iproute2"
    made = _ip("netns", "add", probe := f"pz-probe-{os.getpid()}")
    if made.returncode == 0:
        _ip("netns", "del", probe)
        return None
    return f"network namespaces cannot be made here ({made.stderr.strip() or 'not permitted'})"


@dataclass(frozen=True)
class End:
    """A namespace, the address of its device, and what a command is prefixed with to run in it."""

    name: str
    address: str
    device: str = "eth0"

    @property
    def enter(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]


class Link(threading.Thread):
    """Copies frames between two devices, late or not at all. copied, dropped: how many."""

    def __init__(self, devices: tuple[str, str], delay: float, loss: float, seed: int):
        super().__init__(daemon=True)
        self._delay, self._loss, self._random = delay, loss, random.Random(seed)
        self._sockets = [_socket_of(device) for device in devices]
        self._waiting: list[tuple[float, int, int, bytes]] = []  # when, number, to which, frame
        self._ended = threading.Event()
        self.copied = self.dropped = 0

    def run(self) -> None:
        while not self._ended.is_set():
            now = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now:
                _, _, to, frame = heapq.heappop(self._waiting)
                try:
                    self._sockets[to].send(frame)
                except OSError:  # a device is full or gone: one more frame is lost
                    self.dropped += 1
            wait = self._waiting[0][0] - now if self._waiting else 0.2
            for ready in select.select(self._sockets, [], [], min(max(wait, 0), 0.2))[0]:
                self._take(self._sockets.index(ready))

    def _take(self, of: int) -> None:
        frame, (_, _, kind, *_) = self._sockets[of].recvfrom(LARGEST)
        if kind == OUTGOING:  # what send() sent there
            return
        if self._random.random() < self._loss:
            self.dropped += 1
            return
        self.copied += 1
        heapq.heappush(self._waiting, (time.monotonic() + self._delay, self.copied, 1 - of, frame))

    def close(self) -> None:
        self._ended.set()
        self.join()
        for one in self._sockets:
            one.close()


@contextmanager
def slow_network(delay: float, loss: float, seed: int = 0) -> Iterator[tuple[End, End, Link]]:
    """Two namespaces and the link between them. delay: seconds in each direction."""
    pid = os.getpid()
    ends = tuple(End(f"pz{pid}-{i}", f"10.77.0.{i + 1}") for i in range(2))
    outside = tuple(f"pz{pid % 10**6}v{i}" for i in range(2))
    link = None
    try:
        for end, device in zip(ends, outside, strict=True):
            _do("netns", "add", end.name)
            peer = "peer", "name", end.device, "netns", end.name
            _do("link", "add", device, "type", "veth", *peer)
            _do("link", "set", device, "up")
            _do("-n", end.name, "address", "add", f"{end.address}/24", "dev", end.device)
            _do("-n", end.name, "link", "set", end.device, "up")
            _do("-n", end.name, "link", "set", "lo", "up")
        link = Link(outside, delay, loss, seed)
        link.start()
        yield *ends, link
    finally:
        if link is not None:
            link.close()
        for end, device in zip(ends, outside, strict=True):
            _ip("link", "del", device)
            _ip("netns", "del", end.name)


def _socket_of(device: str) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    found.setsockopt(SOL_PACKET, VNET_HDR, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 23)
    found.bind((device, 0))
    return found


def _ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def _do(*words: str) -> None:
    done = _ip(*words)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
