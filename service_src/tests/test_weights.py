"""Weights: from a hub that fails in every way it can, from archives, directories and other hosts. What is not whole is never in place."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
from hub import Hub

from qwen_coder_service.weights import cli, files
from qwen_coder_service.weights import hub as client

MODEL, REVISION, TOKEN = "Qwen/Tiny", "0123456789abcdef0123456789abcdef01234567", "hf_aValidOneOfThisTest"
NEEDED = ["config.json", "merges.txt", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
LARGE = NEEDED[2]
SIZE = 3_000_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One model, of which an engine needs four files of seven."""
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(client, "ATTEMPTS", 3)
    noise = random.Random(1)
    content = {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"# Tiny\n",
        "config.json": b'{"model_type": "qwen2"}\n',
        "merges.txt": b"a b\n",
        LARGE: noise.randbytes(SIZE),
        NEEDED[3]: noise.randbytes(200_000),
        "pytorch_model.bin": noise.randbytes(1000),
    }
    server = Hub(MODEL, REVISION, content)
    server.url = server.start()  # type: ignore[attr-defined]
    yield server
    server.stop()


@dataclass
class Place:
    """A directory for models, and the command."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    url: str = ""

    @property
    def target(self) -> Path:
        return self.folder / "tiny"

    @property
    def partial(self) -> Path:
        return self.folder / "tiny.partial"

    def run(self, command: str = "fetch", *options: str | Path) -> tuple[int, str, str]:
        status = cli.main([command, str(self.target), *map(str, options)])
        said = self.capsys.readouterr()
        return status, said.out, said.err

    def options(self, *more: str | Path) -> list[str]:
        return ["--model", MODEL, "--revision", REVISION, "--hub-url", self.url, *map(str, more)]

    def fetch(self, *more: str | Path) -> tuple[int, str, str]:
        return self.run("fetch", *self.options(*more))

    def refused(self, sentence: str, *more: str | Path, status: int = 1) -> None:
        """It fails with this sentence and nothing is in place."""
        assert self.fetch(*more)[::2] == (status, sentence + "\n")
        assert not self.target.exists()

    def holds(self, hub: Hub) -> None:
        """All that is needed is in place, as plain files, and nothing else is there."""
        assert sorted(path.name for path in self.target.iterdir()) == [files.MANIFEST, *NEEDED]
        for name in NEEDED:
            assert (self.target / name).read_bytes() == hub.files[name]
            assert not (self.target / name).is_symlink()
        assert not self.partial.exists()
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", files.MANIFEST], cwd=self.target, check=True)


@pytest.fixture
def place(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path / "models", capsys, hub.url)  # type: ignore[attr-defined]


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


def test_the_stand_in_is_a_hub_to_the_hubs_own_client(hub: Hub, place: Place, tmp_path: Path) -> None:
    """What the tests below prove is worth as much as this."""
    code = (
        "import sys, huggingface_hub as h; url, to = sys.argv[1:]\n"
        f"h.snapshot_download('{MODEL}', revision='{REVISION}', endpoint=url, local_dir=to, token=False)\n"
        f"info = h.HfApi(url, token=False).model_info('{MODEL}', revision='{REVISION}', files_metadata=True)\n"
        "print({s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs}, info.sha)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code, place.url, tmp_path / "got"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "got" / name).read_bytes() for name in hub.files} == hub.files
    assert sha256(hub.files[LARGE]) in done.stdout and REVISION in done.stdout


def test_it_fetches_what_is_needed_and_then_asks_no_more(hub: Hub, place: Place) -> None:
    assert place.fetch()[0] == 0
    place.holds(hub)
    assert not [entry for entry in hub.requests if entry["path"].endswith((".bin", ".md", ".gitattributes"))]
    assert (place.target.stat().st_mode & 0o777, (place.target / LARGE).stat().st_mode & 0o777) == (0o755, 0o644)
    hub.requests.clear()
    hub.always = 500
    status, out, _ = place.fetch()
    assert (status, out) == (0, f"{place.target} is there with all its files\n")
    assert place.run("status", "--model", MODEL, "--revision", REVISION)[0] == 0
    assert hub.requests == []


def test_a_mirror_below_a_path_and_a_token_that_only_the_hub_sees(hub: Hub, place: Place, token: Path) -> None:
    hub.prefix, hub.tokens = "/mirrors/hub", [TOKEN]
    place.url += "/mirrors/hub/"
    assert place.fetch("--token-file", token)[0] == 0
    place.holds(hub)
    assert {entry["token"] for entry in hub.requests if entry["path"].startswith("/store/")} == {""}
    assert {entry["token"] for entry in hub.requests if entry["path"].startswith(hub.prefix)} == {TOKEN}


def test_a_broken_connection_is_gone_on_with_in_the_same_run(hub: Hub, place: Place) -> None:
    hub.cut_after, hub.cuts = 1_000_000, 2
    assert place.fetch()[0] == 0
    place.holds(hub)
    assert hub.asked(LARGE) == ["", "bytes=1000000-", "bytes=2000000-"]


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file at a time, the largest first."""
    monkeypatch.setattr(client, "WORKERS", 1)


@pytest.mark.usefixtures("in_turn")
def test_the_next_run_asks_for_the_rest_only(hub: Hub, place: Place) -> None:
    hub.cut_after, hub.cuts, hub.then = 1_200_000, 1, 503
    place.refused(f"{place.url} answers 503 for {LARGE}, 3 times in a row; run this again later.", status=75)
    assert (place.partial / LARGE).stat().st_size == 1_200_000
    hub.broken = False
    hub.requests.clear()
    assert place.fetch()[0] == 0
    place.holds(hub)
    assert hub.asked(LARGE) == ["bytes=1200000-"]


@pytest.mark.usefixtures("in_turn")
def test_a_hub_that_knows_no_ranges_is_asked_for_all_of_it(hub: Hub, place: Place) -> None:
    hub.cut_after, hub.cuts, hub.ranges = 1_200_000, 1, False
    assert place.fetch()[0] == 0
    place.holds(hub)


def begun(place: Place, *options: str) -> subprocess.Popen[str]:
    """The command as a process of its own, once it has a part of the largest file."""
    command = [sys.executable, "-m", "qwen_coder_service.weights", "fetch", str(place.target), *place.options(*options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 30
    while not (place.partial / LARGE).exists() or (place.partial / LARGE).stat().st_size < 1_000_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_kill_9_in_the_middle_leaves_what_the_next_run_goes_on_with(hub: Hub, place: Place) -> None:
    hub.slow_s = 0.05
    process = begun(place)
    process.kill()
    process.communicate()
    assert not place.target.exists()
    have = (place.partial / LARGE).stat().st_size
    assert 1_000_000 <= have < SIZE
    hub.slow_s = 0
    hub.requests.clear()
    assert place.fetch()[0] == 0
    place.holds(hub)
    assert hub.asked(LARGE) == [f"bytes={have}-"]


def test_only_one_at_a_time(hub: Hub, place: Place) -> None:
    hub.slow_s = 0.05
    process = begun(place)
    place.refused(f"Another qwen-weights works on {place.partial}; wait until it has ended.", status=75)
    hub.slow_s = 0
    assert process.communicate()[0].endswith("is in place\n")
    place.holds(hub)


def test_systemd_is_told_how_far_it_is_and_why_it_failed(hub: Hub, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        hub.slow_s = 0.05
        process = begun(place)
        said = notified.recv(1000).decode()
        process.kill()
        process.communicate()
        assert re.fullmatch(r"STATUS=0\.0 of 0\.0 GB, \d+ MB/s, \d+ min left", said)
        monkeypatch.delenv("NOTIFY_SOCKET")
        monkeypatch.setenv("QWEN_NOTIFY_SOCKET", str(tmp_path / "notify"))
        hub.statuses = [404]
        _, _, sentence = place.fetch()
        while not (said := notified.recv(1000).decode()).startswith("STATUS=http"):
            pass
        assert said == f"STATUS={sentence.strip()}"


# what a hub may say, and what is made of it
def test_401_without_a_token(hub: Hub, place: Place) -> None:
    hub.tokens = [TOKEN]
    place.refused(
        f"{place.url} shows {MODEL} to nobody without a token (401), or has no such model; set qwen_service_hub_token, or correct "
        "qwen_service_model."
    )
    assert not place.partial.exists()


def test_401_with_a_token_that_is_no_longer_valid(hub: Hub, place: Place, token: Path) -> None:
    hub.tokens = ["another"]
    place.refused(f"{place.url} does not accept the token (401); set qwen_service_hub_token to a valid one.", "--token-file", token)
    assert len(hub.requests) == 1


def test_403_for_a_gated_model(hub: Hub, place: Place, token: Path) -> None:
    hub.tokens = hub.without_access = [TOKEN]
    place.refused(
        f"{place.url} keeps {MODEL} from the token's account (403); ask for access on the model's page there, or set "
        "qwen_service_hub_token to a token of an account that has it.",
        "--token-file", token,
    )  # fmt: skip


def test_404_for_a_model_a_commit_and_a_file(hub: Hub, place: Place) -> None:
    hub.model = "Qwen/Another"
    place.refused(f"{place.url} has not got {MODEL} (404); correct qwen_service_model, or set qwen_service_hub_url to a hub that has it.")
    hub.model, hub.revision = MODEL, "f" * 40
    place.refused(f"{place.url} has no commit {REVISION} of {MODEL} (404); set qwen_service_model_revision to one that it has.")
    hub.revision, hub.always = REVISION, 404
    status, _, error = place.fetch()
    assert status == 1 and re.fullmatch(rf"{place.url} has not got \S+ \(404\); correct .*\n", error)
    assert not place.target.exists()


def test_429_is_waited_for_as_long_as_the_hub_says(hub: Hub, place: Place) -> None:
    hub.statuses, hub.retry_after = [429, 503], "1"
    began = time.monotonic()
    status, out, _ = place.fetch()
    assert status == 0 and time.monotonic() - began >= 2
    assert f"{place.url} answers 429 for {MODEL}; another attempt in 1 s\n" in out
    place.holds(hub)


def test_429_by_date_and_by_the_hubs_own_header() -> None:
    def wait(**headers: str) -> float | None:
        return client._asked_to_wait(httpx.Response(429, headers={name.replace("_", "-"): value for name, value in headers.items()}))

    assert 28 < (wait(Retry_After=formatdate(time.time() + 30, usegmt=True)) or 0) <= 30
    assert wait(RateLimit='"api";r=0;t=55') == 55
    assert wait(RateLimit='"api";r=7;t=55') is None
    assert wait(Retry_After="soon") is None
    assert wait() is None


def test_429_without_end_and_for_longer_than_one_waits(hub: Hub, place: Place) -> None:
    hub.statuses = [429] * 3
    place.refused(f"{place.url} answers 429 for {MODEL}, 3 times in a row; run this again later.", status=75)
    assert len(hub.requests) == 3
    hub.statuses, hub.retry_after = [429], "3600"
    place.refused(f"{place.url} answers 429 for {MODEL} and asks to wait 3600 s; run this again after that.", status=75)


def test_500_passes_or_does_not(hub: Hub, place: Place) -> None:
    hub.statuses = [500] * 3
    place.refused(f"{place.url} answers 500 for {MODEL}, 3 times in a row; run this again later.", status=75)
    hub.statuses = [500, 502]
    assert place.fetch()[0] == 0
    place.holds(hub)


def test_nobody_there(hub: Hub, place: Place) -> None:
    hub.stop()
    status, _, error = place.fetch()
    assert status == 75
    assert re.fullmatch(rf"{place.url} cannot be reached for {MODEL} \(.*refused.*\), 3 times in a row; run this again later.\n", error)
    assert not place.target.exists() and not place.partial.exists()
    hub.start()


def test_what_answers_is_no_hub(hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.url = f"{hub.store}/store/config.json?"
    status, _, error = place.fetch()
    assert status == 1 and re.fullmatch(r"http\S+ lists no files with sizes and sums \(.*\); set qwen_service_hub_url to a hub.\n", error)


@pytest.mark.parametrize(("name", "kind"), [(LARGE, "SHA-256"), ("config.json", "git")])
def test_a_file_with_another_sum_is_removed_and_got_anew(hub: Hub, place: Place, name: str, kind: str) -> None:
    hub.spoiled = [name]
    right = hub.files[name]
    wrong = bytes([right[0] ^ 1]) + right[1:]
    sums = [sha256(data) if kind == "SHA-256" else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() for data in (wrong, right)]
    place.refused(f"{name} has the {kind} sum {sums[0]} instead of {sums[1]}; it was removed, run this again to get it anew.")
    assert not (place.partial / name).exists()
    hub.spoiled = []
    assert place.fetch()[0] == 0
    place.holds(hub)


@pytest.mark.usefixtures("in_turn")
def test_a_file_that_ends_too_early_is_not_taken_for_whole(hub: Hub, place: Place) -> None:
    hub.short = [LARGE]
    status, _, error = place.fetch()
    assert status == 75 and LARGE in error
    assert not place.target.exists()
    hub.short = []
    assert place.fetch()[0] == 0
    place.holds(hub)


def test_a_part_that_was_spoiled_on_the_disk_is_noticed(hub: Hub, place: Place) -> None:
    place.partial.mkdir(parents=True)
    (place.partial / LARGE).write_bytes(b"\0" * 1_000_000)
    status, _, error = place.fetch()
    assert status == 1 and error.startswith(f"{LARGE} has the SHA-256 sum ")
    assert place.fetch()[0] == 0
    place.holds(hub)


def test_a_hub_that_names_files_outside_is_refused(hub: Hub, place: Place) -> None:
    hub.files["../evil.json"] = b"{}"
    place.refused(f"{place.url} names '../evil.json', which is no place inside a model's folder; make it anew with plain relative names.")
    assert not (place.folder / "evil.json").exists()


def test_a_model_without_safetensors_is_refused(hub: Hub, place: Place) -> None:
    for name in NEEDED[2:]:
        del hub.files[name]
    place.refused(f"{MODEL} at {REVISION} holds no config.json with safetensors; set qwen_service_model to a model that does.")


def test_a_manifest_of_ones_own_wins(hub: Hub, place: Place, tmp_path: Path) -> None:
    manifest = tmp_path / "sums"
    lines = {name: f"{sha256(hub.files[name])}  {name}\n" for name in NEEDED}
    manifest.write_text("".join(lines.values()))
    assert place.fetch("--manifest", manifest)[0] == 0
    place.holds(hub)
    shutil.rmtree(place.target)
    other = "0" * 64
    manifest.write_text("".join(lines[name] for name in NEEDED[:2] + NEEDED[3:]) + f"{other}  {LARGE}\n")
    hub.requests.clear()
    place.refused(
        f"{manifest} gives {LARGE} the SHA-256 sum {other} and the hub gives it {sha256(hub.files[LARGE])}; find out which is right before "
        "either is used.",
        "--manifest", manifest,
    )  # fmt: skip
    assert len(hub.requests) == 1  # and nothing was downloaded
    manifest.write_text("".join(lines.values()) + f"{other}  more.json\n")
    place.refused(
        f"{manifest} names more.json, which the hub has not got at this commit; set qwen_service_model_manifest anew.",
        "--manifest", manifest,
    )  # fmt: skip
    # of small files the hub gives no SHA-256 sum: seen when it is there
    manifest.write_text("".join(lines[name] for name in NEEDED[1:]) + f"{other}  config.json\n")
    place.refused(
        f"config.json has the SHA-256 sum {sha256(hub.files['config.json'])} instead of {other}; it was removed, run this again to get it "
        "anew.",
        "--manifest", manifest,
    )  # fmt: skip


# room
def test_the_disk_is_asked_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 40 * files.GB}))
    partial = files.Partial(place.target)
    partial.room(39 * files.GB)
    with pytest.raises(files.WeightsError) as error:
        partial.room(65_540_000_000)
    assert str(error.value) == (
        f"{place.folder} has 40.00 GB free and 66.20 GB more are needed; free some, or set qwen_service_model_dir to a directory on a "
        "larger file system."
    )


def on_a_small_disk(place: Place, size: str, script: str) -> str:
    """Run a script with the models' directory on a file system of that size of its own; $fetch is the command."""
    place.folder.mkdir(exist_ok=True)
    fetch = shlex.join([sys.executable, "-m", "qwen_coder_service.weights", "fetch", str(place.target), *place.options()])
    setup = f"cd {place.folder.parent}; mount -t tmpfs -o size={size} none {place.folder}; fetch={shlex.quote(fetch)}; "
    done = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", setup + script], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_a_disk_that_is_too_small_gets_no_byte(hub: Hub, place: Place) -> None:
    said = on_a_small_disk(place, "3m", f"$fetch; echo status $?; ls -A {place.folder}")
    assert re.fullmatch(rf"status 1\n{place.folder} has 0\.00 GB free and 0\.00 GB more are needed; .*\n", said)
    assert len(hub.requests) == 1


def test_a_disk_that_somebody_fills_meanwhile(hub: Hub, place: Place) -> None:
    hub.slow_s = 0.03
    said = on_a_small_disk(
        place,
        "5m",
        f"""(while [ $(stat -c %s {place.partial}/{LARGE} 2>/dev/null || echo 0) -lt 500000 ]; do sleep 0.02; done
        head -c 10m /dev/zero >{place.folder}/filler 2>/dev/null) &
        $fetch; echo status $?; ls {place.folder}; wait; rm {place.folder}/filler
        $fetch; echo status $?; ls {place.folder}; cat {place.target}/{LARGE} | sha256sum""",
    )
    assert "status 1\nfiller\ntiny.partial\n" in said
    assert (
        f"{place.folder} is full, something else has filled it meanwhile; free some space and run this again, what is there is kept.\n"
        in said
    )
    assert f"status 0\ntiny\n{sha256(hub.files[LARGE])}" in said
    assert [asked != "" for asked in hub.asked(LARGE)] == [False, True]


# what is there
def test_what_is_in_place_is_never_touched(hub: Hub, place: Place) -> None:
    place.target.mkdir(parents=True)
    (place.target / "config.json").write_text("{}")
    assert place.fetch()[::2] == (
        1,
        f"{place.target} is there without MANIFEST.sha256, so nothing says whether it is whole; move it to {place.partial} to have it "
        "checked, or set qwen_service_model_dir to another directory.\n",
    )
    assert (place.target / "config.json").read_text() == "{}"
    # what the sentence says works
    for name in NEEDED:
        (place.target / name).write_bytes(hub.files[name])
    place.target.rename(place.partial)
    hub.requests.clear()
    assert place.fetch()[0] == 0
    place.holds(hub)
    assert hub.asked(LARGE) == []


def test_another_commit_and_a_file_that_has_shrunk(place: Place) -> None:
    assert place.fetch()[0] == 0
    other = "f" * 40
    assert place.run("status", "--model", MODEL, "--revision", other)[::2] == (
        1,
        f"{place.target} holds {MODEL}@{REVISION} and not {MODEL}@{other}; set qwen_service_model_dir to another directory, or remove this "
        "one.\n",
    )
    (place.target / LARGE).write_bytes(b"")
    assert place.fetch()[::2] == (
        1,
        f"{place.target}/{LARGE} has 0 bytes instead of {SIZE}; remove {place.target} and run this again.\n",
    )
    (place.target / LARGE).unlink()
    assert place.run("status")[2] == f"{place.target}/{LARGE} is not there; remove {place.target} and run this again.\n"


def test_verify_hashes_everything(hub: Hub, place: Place) -> None:
    assert place.run("status")[:2] == (1, f"{place.target} is not there yet\n")
    assert place.fetch()[0] == 0
    assert place.run("verify")[0] == 0
    wrong = bytes(SIZE)
    (place.target / LARGE).write_bytes(wrong)
    (place.target / "merges.txt").unlink()
    assert place.run("verify")[::2] == (
        1,
        f"{place.target}/merges.txt is not there. {place.target}/{LARGE} has the SHA-256 sum {sha256(wrong)} instead of "
        f"{sha256(hub.files[LARGE])}.\n",
    )


# from this host
@pytest.fixture
def source(hub: Hub, tmp_path: Path) -> Path:
    """A directory with the model and its manifest, as ``sha256sum *`` makes it; one file is a link, as in the hub's own cache."""
    folder = tmp_path / "carried"
    folder.mkdir()
    for name, data in hub.files.items():
        (folder / name).write_bytes(data)
    (tmp_path / "blob").write_bytes(hub.files[LARGE])
    (folder / LARGE).unlink()
    (folder / LARGE).symlink_to(tmp_path / "blob")
    subprocess.run("sha256sum * >MANIFEST.sha256", shell=True, cwd=folder, check=True)
    return folder


def tar(folder: Path, path: Path, *options: str) -> Path:
    subprocess.run(["tar", "--create", "--auto-compress", f"--file={path}", *options], cwd=folder, check=True)
    return path


def test_from_a_directory(hub: Hub, place: Place, source: Path) -> None:
    assert place.run("fetch", "--from", source)[0] == 0
    place.holds(hub)
    assert hub.requests == []


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("inside", [".", "carried"])
def test_from_an_archive(hub: Hub, place: Place, source: Path, suffix: str, inside: str) -> None:
    folder = source if inside == "." else source.parent
    archive = tar(folder, source.parent / f"model.{suffix}", "--dereference", inside)
    assert place.run("fetch", "--from", archive, "--model", MODEL, "--revision", REVISION)[0] == 0
    place.holds(hub)
    assert place.run("status", "--model", MODEL, "--revision", REVISION)[0] == 0


def from_here(place: Place, source: Path, sentence: str, *options: str | Path, status: int = 1) -> None:
    assert place.run("fetch", "--from", source, *options)[::2] == (status, sentence + "\n")
    assert not place.target.exists()


def test_a_directory_that_is_not_what_its_manifest_says(hub: Hub, place: Place, source: Path) -> None:
    (source / "merges.txt").write_text("c d\n")
    right, wrong = sha256(hub.files["merges.txt"]), sha256(b"c d\n")
    from_here(place, source, f"merges.txt of {source} has the SHA-256 sum {wrong} instead of {right}; bring that file anew.")
    (source / "merges.txt").unlink()
    from_here(place, source, f"{source} has not got merges.txt, which the manifest names; bring the whole model.")
    (source / "MANIFEST.sha256").unlink()
    from_here(
        place,
        source,
        f"{source} holds no MANIFEST.sha256 and none was given, so nothing says whether its files are right; make one where they come from "
        "(sha256sum * > MANIFEST.sha256) and set qwen_service_model_manifest to it.",
    )
    manifest = source.parent / "given"
    manifest.write_text(f"{sha256(hub.files['config.json'])} *config.json\n{sha256(hub.files[LARGE])} *{LARGE}\n")
    assert place.run("fetch", "--from", source, "--manifest", manifest)[0] == 0
    assert sorted(path.name for path in place.target.iterdir()) == [files.MANIFEST, "config.json", LARGE]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "{} is empty; it should hold lines as sha256sum writes them."),
        ("sums\n", "{} has the line 'sums', which is not one that sha256sum writes; make it anew."),
        ("0" * 64 + "  ../x\n", "{} names '../x', which is no place inside a model's folder; make it anew with plain relative names."),
        ("0" * 64 + "  a.json\n", "The manifest of {source} names no config.json; make it of all files of the model."),
    ],
)
def test_a_manifest_that_is_none(place: Place, source: Path, content: str, sentence: str) -> None:
    (source / "a.json").write_text("{}")
    content = content.replace("0" * 64 + "  a.json", sha256(b"{}") + "  a.json")
    manifest = source.parent / "given"
    manifest.write_text(content)
    from_here(place, source, sentence.format(manifest, source=source), "--manifest", manifest)


def test_an_archive_that_is_damaged_or_cut_off(place: Place, source: Path) -> None:
    archive = tar(source, source.parent / "model.tar.gz", "--dereference", ".")
    archive.write_bytes(archive.read_bytes()[:1_500_000])
    assert "is damaged, or no archive that can be read here" in place.run("fetch", "--from", archive)[2]
    plain = tar(source, source.parent / "model.tar", "--dereference", ".")
    plain.write_bytes(plain.read_bytes()[:1_500_000])
    assert place.run("fetch", "--from", plain)[0] == 1
    plain.write_bytes(b"(\xb5/\xfd zstd")
    assert "give a whole .tar, .tar.gz or .tar.xz." in place.run("fetch", "--from", plain)[2]
    assert not place.target.exists()


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "a/../../evil.json"])
def test_an_archive_that_points_out_of_itself(place: Place, source: Path, name: str) -> None:
    archive = tar(source, source.parent / "model.tar", "--dereference", ".")
    with tarfile.open(archive, "a") as opened:
        opened.addfile(tarfile.TarInfo(name), io.BytesIO())
    from_here(
        place, archive, f"{archive} names '{name}', which is no place inside a model's folder; make it anew with plain relative names."
    )


def test_an_archive_with_links(place: Place, source: Path) -> None:
    archive = tar(source.parent, source.parent / "model.tar", "carried")
    from_here(place, archive, f"{archive} holds 'carried/{LARGE}' as a link or device; make it anew with tar --dereference.")


def test_a_source_that_is_not_there(place: Place) -> None:
    from_here(
        place,
        Path("/none.tar"),
        "--from is '/none.tar', which is not there; set qwen_service_model_archive to an archive or directory on this host.",
        status=2,
    )


# from another host
def test_what_another_host_sent_is_checked_and_sealed(hub: Hub, place: Place, source: Path) -> None:
    shutil.copytree(source, place.partial)
    (place.partial / "merges.txt").write_text("")
    assert place.run("seal")[::2] == (
        1,
        f"{place.partial}/merges.txt has the SHA-256 sum {sha256(b'')} instead of {sha256(hub.files['merges.txt'])}; it was removed. Bring "
        "what is named anew.\n",
    )
    assert not place.target.exists() and not (place.partial / "merges.txt").exists()
    (place.partial / "merges.txt").write_bytes(hub.files["merges.txt"])
    assert place.run("seal", "--model", MODEL, "--revision", REVISION)[0] == 0
    place.holds(hub)
    assert (place.target / files.MANIFEST).read_text().startswith(f"# {MODEL}@{REVISION}\n")


# wrong use
@pytest.mark.parametrize("revision", ["main", "v1.0", REVISION[:12], REVISION.upper()])
def test_a_revision_that_can_move_is_refused(hub: Hub, place: Place, revision: str) -> None:
    assert place.run("fetch", "--model", MODEL, "--revision", revision, "--hub-url", place.url)[::2] == (
        2,
        f"--revision is '{revision}', which is no commit; set qwen_service_model_revision to the 40 hexadecimal digits of one, since a "
        "branch or a tag can move.\n",
    )
    assert hub.requests == []


def test_wrong_use_is_status_2(hub: Hub, place: Place, tmp_path: Path) -> None:
    assert place.run("fetch", "--model", MODEL)[::2] == (2, "Neither --from nor both of --model and --revision say what to fetch.\n")
    for url in ("huggingface.co", "ftp://hub", "https://", "https://hub:port"):
        place.url = url
        place.refused(f"--hub-url is '{url}', which is no address; set qwen_service_hub_url to one like https://huggingface.co.", status=2)
    (tmp_path / "token").write_text("two words\n")
    place.refused(
        f"--token-file is '{tmp_path}/token', which does not hold one token; set qwen_service_hub_token to one.",
        "--token-file", tmp_path / "token", status=2,
    )  # fmt: skip
    assert place.fetch("--token-file", tmp_path / "none")[0] == 2
    with pytest.raises(SystemExit) as error:
        cli.main(["bring"])
    assert error.value.code == 2
    assert hub.requests == []
