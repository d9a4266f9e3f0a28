"""A node is taken out of a gateway's rotation, and that is kept."""

from __future__ import annotations

import grp
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins import load

server = load("roles/gateway/library/gateway_server.py")

STATS = "# pxname,svname,qcur,scur,status,bck,\nnodes,node1,0,3,UP,0,\nnodes,node2,0,0,DOWN 1/2,0,\nnodes,hold,0,0,no check,1,\n\n"
STATES = """1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight
3 nodes 1 node1 192.0.2.1 2 0 1
3 nodes 2 node2 192.0.2.2 0 {bits} 1

"""


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A gateway's admin socket that answers what it is told to."""
    answers = {"show stat": STATS, "show servers state": STATES.format(bits=0)}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "admin.sock"))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    asked = connection.recv(1000).decode()
                    connection.sendall(next((text for start, text in answers.items() if asked.startswith(start)), "").encode())

        threading.Thread(target=serve, daemon=True).start()
        yield server.Gateway(str(tmp_path / "admin.sock"), "nodes"), answers
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("bits", "meaning"), [(0, ""), (1, "maint"), (8, "drain"), (9, "maint"), (32, ""), (40, "drain")])
def test_how_a_node_was_taken_out_is_known_even_when_it_is_down(admin: Any, bits: int, meaning: str) -> None:
    gateway, answers = admin
    answers["show servers state"] = STATES.format(bits=bits)
    assert gateway.taken_out("node2") == meaning
    assert gateway.taken_out("node1") == ""
    assert {name: row["scur"] for name, row in gateway.servers().items()} == {"node1": "3", "node2": "0"}


def test_what_is_kept_over_a_reload_is_who_was_taken_out_and_not_who_was_down(admin: Any, tmp_path: Path) -> None:
    gateway, answers = admin
    answers["show servers state"] = STATES.format(bits=8)
    kept, group = tmp_path / "there" / "servers.state", grp.getgrgid(os.getgid()).gr_name
    assert gateway.save(kept, group, True)
    assert not kept.exists()
    assert gateway.save(kept, group, False)
    assert kept.read_text().splitlines() == [
        "1",
        "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight",
        "3 nodes 2 node2 192.0.2.2 2 8 1",
    ]
    assert not gateway.save(kept, group, False)
    answers["show servers state"] = STATES.format(bits=1)
    assert gateway.save(kept, group, False)
    answers["show servers state"] = STATES.format(bits=0)
    assert gateway.save(kept, group, False)
    assert kept.read_text().splitlines()[2:] == []
    assert not gateway.save(kept, group, False)
