"""A model's files from a hub, at one commit: asked for twice where the hub is busy, gone on with where a connection broke.

Two requests of the hub's protocol are all that is needed, and mirrors speak them: a commit's list of files with sizes and sums, and a
range of a file. huggingface_hub asks for the same, but throws away what it has of a file when it is interrupted.
"""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import certifi
import httpx

from .files import CHUNK, WORKERS, File, Partial, Progress, Sums, TryLater, WeightsError, WrongUse, check_name, wanted

ATTEMPTS = 6
"""Times in a row that something may fail without a byte gained."""
BACKOFF_S = 1.0
"""Seconds before the second attempt; doubled for each further one."""
PATIENCE_S = 120.0
"""Seconds that a hub may ask to wait; one that asks for more is left for later."""

T = TypeVar("T")


def agreed(files: Mapping[str, File], expected: Mapping[str, File], manifest: str) -> dict[str, File]:
    """What the manifest names of what the hub has, with the manifest's sums.

    Raises:
        WeightsError: the two contradict each other.
    """
    result = {}
    for name, file in expected.items():
        if not wanted(name):
            continue
        if name not in files:
            raise WeightsError(f"{manifest} names {name}, which the hub has not got at this commit; set qwen_service_model_manifest anew.")
        if files[name].sha256 not in (None, file.sha256):
            raise WeightsError(
                f"{manifest} gives {name} the SHA-256 sum {file.sha256} and the hub gives it {files[name].sha256}; find out which is "
                "right before either is used."
            )
        result[name] = replace(files[name], sha256=file.sha256)
    return result


class _Again(Exception):
    """An attempt failed that another may follow."""

    def __init__(self, reason: str, wait_s: float | None = None, gained: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.gained = wait_s, gained


class _Stopped(Exception):
    """Another file has failed."""


def _asked_to_wait(response: httpx.Response) -> float | None:
    """Seconds, by ``Retry-After`` or by the hub's own ``RateLimit``."""
    after = response.headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    if after:
        try:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
        except ValueError:
            return None
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


class Hub:
    """One model at one commit of a hub.

    Args:
        url: where the hub is, with the path below which a mirror serves it.
        model: its name there, ``owner/name``.
        revision: a commit, 40 hexadecimal digits.
        token: empty where none is needed.
    """

    def __init__(self, url: str, model: str, revision: str, token: str = "") -> None:
        try:
            known = httpx.URL(url).scheme in {"http", "https"} and httpx.URL(url).host
        except httpx.InvalidURL:
            known = False
        if not known:
            raise WrongUse(f"--hub-url is '{url}', which is no address; set qwen_service_hub_url to one like https://huggingface.co.")
        self._url, self._model, self._revision, self._token = url.rstrip("/"), model, revision, token
        # the host's own authorities (a mirror's, for one) beside those that Python packages bring
        authorities = ssl.create_default_context()
        authorities.load_verify_locations(certifi.where())
        self._client = httpx.Client(
            # a token goes to the hub alone: httpx drops it where a redirect leads to another host
            headers={"Authorization": f"Bearer {token}"} if token else {},
            follow_redirects=True,
            timeout=httpx.Timeout(60, connect=20),
            verify=authorities,
        )
        self._stop = threading.Event()

    def files(self) -> dict[str, File]:
        """What the commit holds of what an engine needs.

        Raises:
            WeightsError: the hub refuses, or holds no such weights.
        """
        try:
            answer = self._until_done(self._list)
            found = {str(entry["rfilename"]): entry for entry in answer["siblings"]}
            files = {}
            for name in filter(wanted, found):
                large = found[name].get("lfs") or {}
                sums = (large["sha256"], None) if large else (None, found[name]["blobId"])
                files[name] = File(check_name(name, self._url), int(found[name]["size"]), *sums)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{self._url} lists no files with sizes and sums ({error!r}); set qwen_service_hub_url to a hub.") from error
        if answer.get("sha") != self._revision:
            raise WeightsError(f"{self._url} answers for another commit than {self._revision}; set qwen_service_hub_url to a hub.")
        if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
            raise WeightsError(
                f"{self._model} at {self._revision} holds no config.json with safetensors; set qwen_service_model to a model that does."
            )
        return files

    def fetch(self, files: Mapping[str, File], partial: Partial) -> dict[str, File]:
        """Get what is missing of all files; each comes back with its SHA-256 sum.

        Raises:
            WeightsError: one could not be got, or is not what it should be; what is there of the others is kept.
        """
        there = sum(path.stat().st_size for path in map(partial.path.joinpath, files) if path.is_file())
        total = sum(file.size or 0 for file in files.values())
        partial.room(max(0, total - there))
        print(
            f"{self._model} at {self._revision} from {self._url}: {len(files)} files, {total / 1e9:.1f} GB, {there / 1e9:.1f} GB are there",
            flush=True,
        )
        progress = Progress(total)
        # the largest first, so that the last of them does not come alone
        order = sorted(files.values(), key=lambda file: -(file.size or 0))
        with ThreadPoolExecutor(WORKERS) as pool:
            futures = [pool.submit(self._one, file, partial, progress) for file in order]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()  # does nothing to those that are done
            errors = [error for future in futures if (error := future.exception())]
            # what failed first counts, not what was stopped for it
            for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
                raise error
            return {file.name: file for file in (future.result() for future in futures)}

    def _until_done(self, attempt: Callable[[], T]) -> T:
        failed = 0
        while True:
            try:
                return attempt()
            except _Again as again:
                failed = 1 if again.gained else failed + 1
                if again.wait_s is not None and again.wait_s > PATIENCE_S:
                    raise TryLater(f"{again} and asks to wait {again.wait_s:.0f} s; run this again after that.") from again
                if failed >= ATTEMPTS:
                    raise TryLater(f"{again}, {ATTEMPTS} times in a row; run this again later.") from again
                pause = BACKOFF_S * 2 ** (failed - 1) if again.wait_s is None else again.wait_s
                print(f"{again}; another attempt in {pause:g} s", flush=True)
                if self._stop.wait(pause):
                    raise _Stopped from again

    @contextmanager
    def _get(self, path: str, what: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """Ask; an answer that is no success becomes a sentence."""
        try:
            with self._client.stream("GET", f"{self._url}/{path}", headers=headers) as response:
                # a store that the hub leads to refuses a link that is too old; the next one is new
                elsewhere = response.is_client_error and response.url.host != httpx.URL(self._url).host
                if response.status_code == 429 or response.is_server_error or elsewhere:
                    raise _Again(f"{self._url} answers {response.status_code} for {what}", _asked_to_wait(response))
                if not response.is_success:
                    raise self._refusal(response, what)
                yield response
        except httpx.RequestError as error:
            raise _Again(f"{self._url} cannot be reached for {what} ({error or type(error).__name__})") from error

    def _refusal(self, response: httpx.Response, what: str) -> WeightsError:
        status, reason = response.status_code, response.headers.get("X-Error-Code", "")
        if status == 401 and self._token:
            return WeightsError(f"{self._url} does not accept the token (401); set qwen_service_hub_token to a valid one.")
        if status == 401:
            return WeightsError(
                f"{self._url} shows {self._model} to nobody without a token (401), or has no such model; set qwen_service_hub_token, or "
                "correct qwen_service_model."
            )
        if status == 403:
            return WeightsError(
                f"{self._url} keeps {self._model} from the token's account (403); ask for access on the model's page there, or set "
                "qwen_service_hub_token to a token of an account that has it."
            )
        if status == 404 and reason == "RevisionNotFound":
            return WeightsError(
                f"{self._url} has no commit {self._revision} of {self._model} (404); set qwen_service_model_revision to one that it has."
            )
        if status == 404:
            return WeightsError(
                f"{self._url} has not got {what} (404); correct qwen_service_model, or set qwen_service_hub_url to a hub that has it."
            )
        return WeightsError(f"{self._url} answers {status} for {what}; set qwen_service_hub_url to a hub.")

    def _list(self) -> dict[str, Any]:
        path = f"api/models/{quote(self._model)}/revision/{self._revision}?blobs=true"
        with self._get(path, self._model) as response:
            response.read()
            answer: dict[str, Any] = response.json()
            return answer

    def _one(self, file: File, partial: Partial, progress: Progress) -> File:
        """Get what is missing of one file."""
        path = partial.path / file.name
        size = file.size or 0
        if path.is_file() and path.stat().st_size > size:
            path.unlink()  # of another model that began here
        sums = Sums(size)
        with partial.writing(file.name, "a+b") as opened:
            opened.seek(0)
            while chunk := opened.read(CHUNK):
                sums.update(chunk)
                progress.add(len(chunk), fetched=False)
                self._go_on()

            def attempt() -> None:
                nonlocal sums
                began = opened.tell()
                if began == size:
                    return
                headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={began}-"} if began else {})
                try:
                    with self._get(f"{quote(self._model)}/resolve/{self._revision}/{quote(file.name)}", file.name, headers) as response:
                        if began and response.status_code == 200:  # it knows no ranges
                            opened.truncate(0)
                            opened.seek(0)
                            sums = Sums(size)
                            progress.add(-began)
                        for chunk in response.iter_raw():  # as it comes: a larger piece would be lost where it breaks
                            opened.write(chunk)
                            sums.update(chunk)
                            progress.add(len(chunk))
                            self._go_on()
                            if opened.tell() > size:  # another file, and perhaps an endless one
                                break
                except _Again as again:
                    raise _Again(str(again), again.wait_s, gained=opened.tell() > began) from again
                if opened.tell() < size:
                    raise _Again(f"{self._url} ends {file.name} at {opened.tell()} of {size} bytes", gained=opened.tell() > began)

            self._until_done(attempt)
        return sums.check(path, file)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _Stopped
