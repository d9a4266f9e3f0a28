"""Engines behind one small interface."""

from __future__ import annotations

from ..settings import Settings
from .base import Backend


def create(settings: Settings) -> Backend:
    """The backend that ``QWEN_BACKEND`` names; nothing is loaded yet."""
    if settings.backend == "vllm":
        from .vllm import VllmBackend

        return VllmBackend(settings)
    from .transformers import TransformersBackend

    return TransformersBackend(settings)
