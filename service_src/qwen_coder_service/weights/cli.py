"""``qwen-weights``: bring a model's files to a host, checked, whole or not at all."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from ..lifecycle import sd_notify
from .files import MANIFEST, Partial, WeightsError, WrongUse, check_all, is_full, missing, read_manifest, read_origin, wanted

HUB_URL = "https://huggingface.co"


def _token(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUse(f"--token-file is '{path}', which cannot be read ({error}).") from error
    if not re.fullmatch(r"[!-~]+", token):
        raise WrongUse(f"--token-file is '{path}', which does not hold one token; set qwen_service_hub_token to one.")
    return token


def _origin(options: argparse.Namespace) -> str:
    if options.revision and not re.fullmatch(r"[0-9a-f]{40}", options.revision):
        raise WrongUse(
            f"--revision is '{options.revision}', which is no commit; set qwen_service_model_revision to the 40 hexadecimal digits of one, "
            "since a branch or a tag can move."
        )
    return f"{options.model}@{options.revision}" if options.model and options.revision else ""


def _complete(target: Path, origin: str) -> bool:
    """Whether the target is there with all its files.

    Raises:
        WeightsError: it is there, and not what is asked for.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not (target / MANIFEST).is_file():
        raise WeightsError(
            f"{target} is there without {MANIFEST}, so nothing says whether it is whole; move it to {target}.partial to have it checked, "
            "or set qwen_service_model_dir to another directory."
        )
    held = read_origin(target / MANIFEST)
    if origin and held and held != origin:
        raise WeightsError(f"{target} holds {held} and not {origin}; set qwen_service_model_dir to another directory, or remove this one.")
    if sentence := missing(target):
        raise WeightsError(sentence)
    return True


def _fetch(options: argparse.Namespace, origin: str) -> None:
    partial = Partial(options.target)
    with partial.held():
        try:
            if options.source:
                from . import local

                files = local.bring(options.source, options.manifest, partial)
            else:
                from . import hub

                if not origin:
                    raise WrongUse("Neither --from nor both of --model and --revision say what to fetch.")
                there = hub.Hub(options.hub_url, options.model, options.revision, _token(options.token_file))
                files = there.files()
                if options.manifest:
                    files = hub.agreed(files, read_manifest(options.manifest), str(options.manifest))
                files = there.fetch(files, partial)
            partial.place(files, origin)
        except OSError as error:
            raise (partial.full() if is_full(error) else error) from error


def _seal(options: argparse.Namespace, origin: str) -> None:
    partial = Partial(options.target)
    with partial.held():
        files = read_manifest(options.manifest or partial.path / MANIFEST)
        files = {name: file for name, file in files.items() if wanted(name)}
        if sentences := check_all(partial.path, files, remove=True):
            raise WeightsError(f"{' '.join(sentences)} Bring what is named anew.")
        partial.place(files, origin)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen-weights",
        description=__doc__,
        epilog="exit status: 0 done; 1 failed; 2 wrong use; 75 not now, run it again later",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("fetch", "bring the model to TARGET, from a hub, or from an archive or directory of this host"),
        ("seal", "check what was copied to TARGET.partial, and put it in place"),
        ("status", "say whether TARGET is there with all its files"),
        ("verify", "hash all files of TARGET and compare them with its manifest"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("target", type=Path, metavar="TARGET", help="directory of the model")
        if name == "verify":
            continue
        command.add_argument("--model", default="", help="its name at the hub, owner/name")
        command.add_argument("--revision", default="", help="its commit there, 40 hexadecimal digits")
        if name == "status":
            continue
        command.add_argument("--manifest", type=Path, help="file with lines of sha256sum that all files are checked against")
        if name == "fetch":
            command.add_argument("--from", dest="source", type=Path, help="directory or archive (.tar, .tar.gz, .tar.xz) instead of a hub")
            command.add_argument("--hub-url", default=HUB_URL, help="the hub, or a mirror that speaks its protocol (%(default)s)")
            command.add_argument("--token-file", type=Path, help="file that holds the hub's token")
    return parser


def _run(options: argparse.Namespace) -> int:
    options.target = options.target.absolute()
    target: Path = options.target
    if options.command == "verify":
        if sentences := check_all(target, read_manifest(target / MANIFEST)):
            raise WeightsError(" ".join(sentences))
        print(f"{target} is what its manifest says")
        return 0
    origin = _origin(options)
    if _complete(target, origin):
        print(f"{target} is there with all its files")
        return 0
    if options.command == "status":
        print(f"{target} is not there yet")
        return 1
    (_seal if options.command == "seal" else _fetch)(options, origin)
    print(f"{target} is in place")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Do what is asked, and say in one sentence why not."""
    options = _parser().parse_args(arguments)
    if "NOTIFY_SOCKET" in os.environ:
        os.environ["QWEN_NOTIFY_SOCKET"] = os.environ.pop("NOTIFY_SOCKET")
    try:
        return _run(options)
    except WeightsError as error:
        sentence, status = str(error), error.status
    except OSError as error:
        sentence, status = f"{error.filename or options.target} cannot be used: {error.strerror or error}.", 1
    sd_notify(f"STATUS={sentence}")
    print(sentence, file=sys.stderr)
    return status
