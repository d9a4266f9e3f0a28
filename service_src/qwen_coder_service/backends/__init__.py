"""Engines behind one small interface."""

from __future__ import annotations

import importlib

from ..settings import Settings
from .base import Backend

_BACKENDS = {"vllm": "VllmBackend", "transformers": "TransformersBackend"}


def create(settings: Settings) -> Backend:
    """The backend that ``QWEN_BACKEND`` names; nothing is loaded yet. Another one's libraries need not be there."""
    module = importlib.import_module(f".{settings.backend}", __package__)
    backend: Backend = getattr(module, _BACKENDS[settings.backend])(settings)
    return backend
