"""A model's files from this host: a directory, or an archive that was carried here."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, BinaryIO

from .files import CHUNK, MANIFEST, File, Partial, Progress, Sums, WeightsError, WrongUse, check_name, read_manifest, wanted


def _copy(source: IO[bytes] | BinaryIO, file: File, partial: Partial, progress: Progress) -> File:
    sums = Sums(file.size or 0)
    with partial.writing(file.name) as opened:
        while chunk := source.read(CHUNK):
            opened.write(chunk)
            sums.update(chunk)
            progress.add(len(chunk))
    return replace(file, sha256=sums.sha256)


def from_directory(source: Path, partial: Partial) -> dict[str, File]:
    """Copy what an engine needs; links become files.

    Raises:
        WeightsError: there is no room.
    """
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    files = {name: File(name, (source / name).stat().st_size) for name in names if wanted(name) or name == MANIFEST}
    total = sum(file.size or 0 for file in files.values())
    partial.room(total)
    progress, copied = Progress(total), {}
    for name, file in files.items():
        with (source / name).open("rb") as opened:
            copied[name] = _copy(opened, file, partial, progress)
    return copied


@contextmanager
def _opened(source: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(source) as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise WeightsError(
            f"{source} is damaged, or no archive that can be read here ({error}); give a whole .tar, .tar.gz or .tar.xz."
        ) from error


def from_archive(source: Path, partial: Partial) -> dict[str, File]:
    """Unpack what an engine needs; a folder that all of it is in is left away.

    Raises:
        WeightsError: there is no room, or the archive is damaged, points out of itself, or holds links.
    """
    with _opened(source) as archive:
        members = {check_name(member.name, str(source)): member for member in archive if not member.isdir()}
        tops = {name.split("/")[0] if "/" in name else "" for name in members}
        cut = len(tops.pop()) + 1 if len(tops) == 1 and "" not in tops else 0
        files = {}
        for path, member in members.items():
            name = path[cut:]
            if not (wanted(name) or name == MANIFEST):
                continue
            if not member.isfile():
                raise WeightsError(f"{source} holds '{path}' as a link or device; make it anew with tar --dereference.")
            files[path] = File(name, member.size)
        total = sum(file.size or 0 for file in files.values())
        partial.room(total)
        progress, copied = Progress(total), {}
        for path, file in files.items():
            stream = archive.extractfile(members[path])
            if stream is None:  # of a plain file there is always one
                raise WeightsError(f"{source} gives nothing of '{path}'; make it anew.")
            copied[file.name] = _copy(stream, file, partial, progress)
            if (partial.path / file.name).stat().st_size != file.size:
                raise WeightsError(f"{source} ends within '{path}'; give the whole archive.")
    return copied


def bring(source: Path, manifest: Path | None, partial: Partial) -> dict[str, File]:
    """Copy from a directory or an archive, and compare with the manifest that is given or lies within.

    Raises:
        WeightsError: as above; or there is no manifest; or something is missing or not what it should be.
    """
    if not source.exists():
        raise WrongUse(f"--from is '{source}', which is not there; set qwen_service_model_archive to an archive or directory on this host.")
    expected = read_manifest(manifest) if manifest else {}
    copied = from_directory(source, partial) if source.is_dir() else from_archive(source, partial)
    inner = copied.pop(MANIFEST, None)
    if not expected and inner is None:
        raise WeightsError(
            f"{source} holds no {MANIFEST} and none was given, so nothing says whether its files are right; make one where they come from "
            f"(sha256sum * > {MANIFEST}) and set qwen_service_model_manifest to it."
        )
    return compare(copied, expected or read_manifest(partial.path / MANIFEST), str(source))


def compare(copied: Mapping[str, File], expected: Mapping[str, File], source: str) -> dict[str, File]:
    """Give what the manifest names of what an engine needs.

    Raises:
        WeightsError: something is missing, or not what it should be.
    """
    needed = {name: file for name, file in expected.items() if wanted(name)}
    for name, file in needed.items():
        if name not in copied:
            raise WeightsError(f"{source} has not got {name}, which the manifest names; bring the whole model.")
        if copied[name].sha256 != file.sha256:
            raise WeightsError(
                f"{name} of {source} has the SHA-256 sum {copied[name].sha256} instead of {file.sha256}; bring that file anew."
            )
    if "config.json" not in needed:
        raise WeightsError(f"The manifest of {source} names no config.json; make it of all files of the model.")
    return needed
