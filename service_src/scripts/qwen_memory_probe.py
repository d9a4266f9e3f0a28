#!/usr/bin/env python3
"""Say whether a model fits on this host's GPUs: ``qwen_memory_probe.py --load-model --dtype bfloat16`` (see --help)."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # from a checkout, without installing the service
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from qwen_coder_service.memory_probe import main

    sys.exit(main())
