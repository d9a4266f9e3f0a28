"""Hosts of the lab run thousands of Ansible's modules: each is a zip of sources, which Python compiles anew. Here, it keeps the result.

That is half of a module's processor time. Nothing else changes; a host that is no lab host has no such file.
"""
# Python loads this at every start, and pathlib would take as long as what is saved
# ruff: noqa: PTH103, PTH104, PTH123

import _imp
import marshal
import os
import zipimport

CACHE = "/var/cache/lab-bytecode"
compile_source = zipimport._compile_source


def compile_once(pathname, source):
    """The code of a source, from the cache if it was compiled before."""
    file = f"{CACHE}/{_imp.source_hash(0, source).hex()}-{len(source)}"
    try:
        with open(file, "rb") as there:
            code = marshal.load(there)
    except (OSError, EOFError, ValueError, TypeError):
        code = compile_source(pathname, source)
        try:
            os.makedirs(CACHE, mode=0o755, exist_ok=True)
            with open(f"{file}.{os.getpid()}", "wb") as new:
                marshal.dump(code, new)
            os.rename(new.name, file)
        except OSError:  # not root, or a disk that is full: then it is compiled each time
            pass
    _imp._fix_co_filename(code, pathname)
    return code


zipimport._compile_source = compile_once
