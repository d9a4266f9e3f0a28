"""Load a plugin of a role, which is no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load(path: str) -> ModuleType:
    """The module at a path below the project's root."""
    # a role's module_utils, as its modules import them
    for shared in sorted((ROOT / path).parent.parent.glob("module_utils/*.py")):
        name = f"ansible.module_utils.{shared.stem}"
        if name not in sys.modules and ROOT / path != shared:
            sys.modules[name] = load(str(shared.relative_to(ROOT)))
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
