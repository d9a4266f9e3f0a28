"""FastAPI service over the vLLM engine for a coding model."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("qwen-coder-service")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
