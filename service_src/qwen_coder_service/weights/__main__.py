"""``python -m qwen_coder_service.weights``."""

import sys

from .cli import main

sys.exit(main())
