"""What stood in the way of an installation, in a sentence instead of pip's or uv's words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# what an installer says about a package that it cannot have, and about an index; the first that is found counts
_PACKAGE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*==[^\s`,()]+)")
_CASES = {
    "replaced": r"hash mismatch|do not match the hashes",
    "refused": r"\b40[13]\b|credentials",
    "unreachable": r"failed to fetch|connection|timed? ?out|name resolution|dns error",
    "missing": r"not found in the package registry|no matching distribution|there is no version",
}


def qwen_service_packages_problem(failed: Mapping[str, Any], source: str, indexes: list[str], lock: str) -> str:
    """Say why packages were not installed, and what to set.

    Args:
        failed: result of the task that failed, or of its loop.
        source: ``wheelhouse`` or ``index``.
        indexes: URLs of the indexes; user and password are left out.
        lock: name of the lock file.
    """
    results = failed.get("results", [failed])
    said = re.sub(r"//[^/@\s]*@", "//", "\n".join(str(result.get("stderr") or result.get("msg", "")) for result in results)).strip()
    where = " and ".join(re.sub(r"//[^/@]*@", "//", index) for index in indexes)
    case = next((case for case, words in _CASES.items() if re.search(words, said, re.IGNORECASE)), "")
    found = _PACKAGE.search(said)
    package = found[1] if found else "a package"
    if source != "index":
        return f"the packages of {lock} were not installed from the wheelhouse: {said}"
    if case == "replaced":
        return (
            f"{package} at qwen_service_index_url '{where}' is not the file whose hash is in {lock}; "
            "set it to an index that has the files of PyPI unchanged."
        )
    if case == "refused":
        return f"qwen_service_index_url '{where}' refuses this user and password; set it to a URL with those that it admits."
    if case == "unreachable":
        return (
            f"qwen_service_index_url is '{where}', which this host cannot reach; set it to an index that it can, "
            "or set qwen_service_package_source to wheelhouse."
        )
    if case == "missing":
        return (
            f"{package} is not at qwen_service_index_url '{where}'; put it there, add an index that has it to "
            "qwen_service_extra_index_urls, or set qwen_service_package_source to wheelhouse."
        )
    return f"the packages of {lock} were not installed from qwen_service_index_url '{where}': {said}"


class FilterModule:
    """Ansible's way to find filters."""

    def filters(self) -> dict[str, Any]:
        """By name."""
        return {"qwen_service_packages_problem": qwen_service_packages_problem}
