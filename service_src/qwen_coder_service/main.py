"""What gunicorn loads: ``qwen_coder_service.main:app``."""

from __future__ import annotations

import os

from . import logs
from .app import create_app
from .settings import load

logs.configure()
app = create_app(load(os.environ))
