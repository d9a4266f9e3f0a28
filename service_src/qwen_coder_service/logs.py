"""Logs as JSON, one object a line, for journald and whatever reads it."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

# what every record has, and what vLLM adds to every record
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "vllm_process_name"}


class JsonFormatter(logging.Formatter):
    """Time, level, message, and whatever a record was given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        entry.update({name: value for name, value in vars(record).items() if name not in _STANDARD})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure() -> None:
    """Send the service's own log to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    own = logging.getLogger("qwen_coder_service")
    own.handlers, own.propagate = [handler], False
    own.setLevel(logging.INFO)
