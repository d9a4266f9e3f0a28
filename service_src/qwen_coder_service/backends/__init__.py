"""Engines behind one small interface."""

from __future__ import annotations

from ..settings import Settings
from .base import Backend
from .vllm import VllmBackend


def create(settings: Settings) -> Backend:
    """The backend that ``QWEN_BACKEND`` names; nothing is loaded yet."""
    return {"vllm": VllmBackend}[settings.backend](settings)
