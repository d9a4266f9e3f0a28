"""A plugin of vLLM's (group ``vllm.general_plugins``), loaded by each of its processes: how they wait for each other on a CPU.

On a GPU host a process that waits for another spins and yields, and has a core for that. On a machine of few cores, with several engines
on it, that starves others: kernels with the EEVDF scheduler move who yields again and again far back (seen here: an engine without a
step for 20 s and more, and the kernel's own workers stuck for 37 s on the core to which vLLM binds its workers).
"""

from __future__ import annotations

import time

WAIT_S = 50e-6
"""Seconds between two looks; a step of even the tiny model takes 40 times as long."""


def register() -> None:
    """Let waiting processes sleep a little instead of yielding; on a CPU only."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(WAIT_S)
