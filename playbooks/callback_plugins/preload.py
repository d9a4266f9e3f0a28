"""Callback plugin: what every task needs is loaded once, before Ansible forks a process for each host of each task.

Ansible's workers load filters, tests, the connection, the shell and the action by themselves, for they forget them when they end. Loaded in
the process that forks, they are there at once; scripts/compare_preload.py measures what that saves.
"""

from __future__ import annotations

from typing import Any

from ansible.plugins.callback import CallbackBase
from ansible.plugins.loader import action_loader, connection_loader, filter_loader, shell_loader, test_loader

DOCUMENTATION = """
name: preload
type: aggregate
short_description: Load plugins before workers are forked
description: Loads filters, tests, connection, shell and action plugins in the process that forks the workers, which saves each worker that.
"""


class CallbackModule(CallbackBase):
    """Looks after the loaders before each task: a role that is included adds a directory, which makes them forget what they have."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "preload"

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """Load what this task's workers would."""
        list(filter_loader.all())
        list(test_loader.all())
        for loader, name in ((connection_loader, "ssh"), (connection_loader, "local"), (shell_loader, "sh"), (action_loader, task.action)):
            # a module without an action plugin of its name goes by the one for all
            if not loader.get(name, class_only=True) and loader is action_loader:
                loader.get("ansible.legacy.normal", class_only=True)

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        """A handler is a task, too."""
        self.v2_playbook_on_task_start(task, False)
