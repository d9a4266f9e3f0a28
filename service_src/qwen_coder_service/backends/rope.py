"""Answers longer than the checkpoint was trained for: one rule for every backend."""

from __future__ import annotations

import json
import logging
from typing import Any

from ..settings import Settings

log = logging.getLogger(__name__)


def yarn(settings: Settings) -> dict[str, Any]:
    """What to change in the checkpoint's config when more tokens are asked for than its native length: YaRN; else nothing.

    Without it engines refuse the length, or, told to allow it, answer badly (Qwen's model card names these values). The names are those
    of transformers from 5 on, which every runtime profile has: there, the older ``rope_scaling`` would take rope_theta away.
    """
    config = json.loads((settings.model_path / "config.json").read_text(encoding="utf-8"))
    native = int(config["max_position_embeddings"])
    if settings.max_model_len is None or settings.max_model_len <= native:
        return {}
    factor = settings.max_model_len / native
    log.info("max_model_len %d is above the checkpoint's %d: YaRN with factor %g", settings.max_model_len, native, factor)
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": native,
        "rope_theta": config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
    }
    return {"max_position_embeddings": settings.max_model_len, "rope_parameters": scaling}
