"""Print the TCP ports of an address that accept a connection, of all 65535: scan.py ADDRESS.

A port that a firewall drops never answers, so the scan asks thousands at a time and gives them as long as a busy neighbour needs.
"""

import errno
import resource
import select
import socket
import sys
import time

AT_ONCE = 8000
PATIENCE_SECONDS = 0.5


def open_ports(address: str, ports: range | list[int]) -> list[int]:
    """Ports at which a connection came about within the time."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found, poll, waiting = [], select.epoll(), {}
    for port in ports:
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        code = connection.connect_ex((address, port))
        if code == errno.EINPROGRESS:
            waiting[connection.fileno()] = connection, port
            poll.register(connection, select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP)
        elif code in (0, errno.ECONNREFUSED):
            found += [port] * (code == 0)
            connection.close()
        else:
            raise OSError(code, f"port {port}")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while waiting and (left := deadline - time.monotonic()) > 0:
        for number, _ in poll.poll(left):
            connection, port = waiting.pop(number)
            poll.unregister(number)
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                found.append(port)
            connection.close()
    for connection, _ in waiting.values():
        connection.close()
    poll.close()
    return found


def main() -> None:
    """Scan, and print what is open, in order."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    at_once = min(AT_ONCE, hard - 100)
    found = []
    for first in range(1, 65536, at_once):
        found += open_ports(sys.argv[1], range(first, min(first + at_once, 65536)))
    print(*sorted(found), sep="\n")


if __name__ == "__main__":
    main()
