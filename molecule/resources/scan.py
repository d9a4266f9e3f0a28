"""Print the TCP ports of an address that accept a connection, of all 65535: scan.py ADDRESS, as root.

Each port is sent the segment that begins a connection; the one that would accept it is known by its answer. A socket for each port takes
several times the processor time, and ports that a firewall drops would have to be waited for by the thousand.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import time
from pathlib import Path

HEADER = struct.Struct("!HHIIBBHHH")  # RFC 9293, 3.1
SYN, ACK = 0x02, 0x10
PATIENCE_SECONDS = 0.5
# as often as packets were lost on the way, and no more
TIMES = 3


def lost() -> int:
    """Packets for which a queue of this machine had no room so far."""
    return sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())


def open_ports(address: str, ports: range) -> set[int]:
    """Ports at which a connection would come about."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP)
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        route.connect((address, 1))
        own = route.getsockname()[0]
    # nobody else's while it is bound; the kernel knows of no connection from it, and resets what was accepted
    reserved = socket.socket(family, socket.SOCK_STREAM)
    reserved.bind((own, 0))
    port_here, first = reserved.getsockname()[1], int.from_bytes(os.urandom(4), "big")

    def segment(port: int, checksum: int = 0) -> bytes:
        return HEADER.pack(port_here, port, first, 0, HEADER.size // 4 << 4, SYN, 1024, checksum, 0)

    # what the checksum is of, but for the port: addresses, protocol and length (RFC 9293, 3.1; RFC 8200, 8.1), and the segment
    covered = socket.inet_pton(family, own) + socket.inet_pton(family, address) + struct.pack("!II", HEADER.size, socket.IPPROTO_TCP)
    rest = sum(word for (word,) in struct.iter_unpack("!H", covered + segment(0)))
    found, answered = set(), set()

    def read() -> None:
        """What has arrived, of all of TCP that comes here."""
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, sender = raw.recvfrom(256, socket.MSG_DONTWAIT)
                if sender[0] != address:
                    continue
                if family == socket.AF_INET:
                    packet = packet[(packet[0] & 15) * 4 :]
                port, here, _, acknowledged, _, flags, *_ = HEADER.unpack_from(packet)
                if here == port_here and flags & ACK and acknowledged == (first + 1) % 2**32:
                    answered.add(port)
                    if flags & SYN:
                        found.add(port)

    for _ in range(TIMES):
        before = lost()
        for number, port in enumerate(sorted(set(ports) - answered)):
            total = rest + port
            while total >> 16:
                total = (total & 0xFFFF) + (total >> 16)
            raw.sendto(segment(port, ~total & 0xFFFF), (address, 0))
            # before answers fill the queue
            if number % 64 == 63:
                read()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (left := deadline - time.monotonic()) > 0 and select.select([raw], [], [], left)[0]:
            read()
        if lost() == before:
            break
    raw.close()
    reserved.close()
    return found


if __name__ == "__main__":
    print(*sorted(open_ports(sys.argv[1], range(1, 65536))), sep="\n")
