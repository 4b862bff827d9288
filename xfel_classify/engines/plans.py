"""The cache of plans: models compiled for one kind of GPU.

A plan is always a cache entry, never an artefact: it can be made again from the model.  It is also
executable input, so the folder must be the user's own (mode 0700) and a file that somebody else
could have written is never read.

A file is one line of JSON (the whole key, the hash of the plan) after a magic word, then the plan.
Its name is a hash of the key.  It is built under a lock, so that the ranks of a node build it once;
it gets its name only when it is complete and its answers have been checked.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..core import EngineError

log = logging.getLogger(__name__)

T = TypeVar("T")

VARIABLE = "XFEL_CLASSIFY_CACHE"
MAGIC = b"xfel_classify plan 1\n"
SUFFIX = ".plan"
POLL_S = 0.2
REPORT_S = 10.0
"""How often a rank that waits for another one's build says so."""


class PlanUnusable(EngineError):
    """A plan was refused: damaged, made for another GPU or version, or its answers are wrong."""


def cache_root() -> Path:
    """``$XFEL_CLASSIFY_CACHE``, else the user's cache directory."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "xfel_classify"


@dataclass(frozen=True)
class Key:
    """Everything a plan depends on; a plan with another key is another plan."""

    model: str
    onnx_sha256: str
    lowering: str               # hash of what was done to the network for the precision
    precision: str
    profile: str                # "1..64, 1..1": batches served
    builder: str                # module and version
    gpu: str
    capability: str
    driver: str                 # newest CUDA the driver serves
    options: str                # workspace, optimisation level

    def as_table(self) -> dict[str, str]:
        return dict(vars(self))

    @property
    def digest(self) -> str:
        text = json.dumps(self.as_table(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def file_name(self) -> str:
        readable = "".join(c if c.isalnum() or c in "-." else "_"
                           for c in f"{self.model}-{self.precision}-{self.gpu}")
        return f"{readable[:80]}-{self.digest[:24]}{SUFFIX}"


class PlanCache:
    """Plans in one folder; ``why_not`` says why nothing can be kept there ("" when it can)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else cache_root() / "plans"
        self.why_not = self._prepare()

    def _prepare(self) -> str:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.lstat()
        except OSError as error:
            return f"{self.folder} cannot be made ({error})"
        if not stat.S_ISDIR(found.st_mode):
            return f"{self.folder} is not a directory of its own"
        if found.st_uid != os.geteuid():
            return f"{self.folder} belongs to user {found.st_uid}, not to you"
        if stat.S_IMODE(found.st_mode) & 0o077:
            try:
                self.folder.chmod(0o700)
            except OSError as error:
                return f"{self.folder} is open to others and cannot be closed ({error})"
            for path in self.folder.glob(f"*{SUFFIX}"):     # others may have written here
                with contextlib.suppress(OSError):
                    path.unlink()
            log.warning("plan cache %s was open to others: its plans were removed", self.folder)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            return f"{self.folder} is not writable"
        return ""

    def path(self, key: Key) -> Path:
        return self.folder / key.file_name

    def read(self, key: Key) -> bytes | None:
        """The plan of ``key``; None when there is none; :class:`PlanUnusable` for a bad file."""
        if self.why_not:
            return None
        table, plan = _read(self.path(key))
        if table is None:
            return None
        if table.get("key") != key.as_table():
            raise PlanUnusable(f"{self.path(key)} was made for something else")
        return plan

    def write(self, key: Key, plan: bytes, notes: Mapping[str, Any]) -> None:
        """Keep ``plan`` under its final name, complete or not at all."""
        path = self.path(key)
        unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        head = {"key": key.as_table(), "sha256": hashlib.sha256(plan).hexdigest(),
                "notes": dict(notes)}
        try:
            handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW,
                             0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + json.dumps(head, sort_keys=True).encode() + b"\n")
                file.write(plan)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            log.warning("the plan of %s cannot be kept in %s (%s); this process uses it from "
                        "memory, the next one builds it again", key.model, self.folder, error)

    def remove(self, key: Key) -> None:
        with contextlib.suppress(OSError):
            self.path(key).unlink()

    def entries(self) -> list[tuple[Path, dict[str, Any] | str]]:
        """Every plan file with its head, or the reason why it is unusable."""
        found: list[tuple[Path, dict[str, Any] | str]] = []
        if self.why_not:
            return found
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                table, plan = _read(path)
            except PlanUnusable as error:
                found.append((path, str(error)))
                continue
            if table is not None:
                found.append((path, table | {"bytes": len(plan)}))
        return found

    @contextlib.contextmanager
    def lock(self, key: Key) -> Iterator[None]:
        """Only one process of those that share the folder is inside; the others wait and say so.

        The lock goes with the process that holds it, however that ends.  Where the file system
        has no locks everybody builds; the plan still appears whole.
        """
        path = self.folder / f".{key.digest[:24]}.lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.info("no lock in %s (%s)", self.folder, error)
            yield
            return
        try:
            _wait_for(handle, key)
            yield
        finally:
            os.close(handle)


def _wait_for(handle: int, key: Key) -> None:
    """Take the lock on an open file; a line now and then while somebody else has it."""
    begun = said = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now = time.monotonic()
            if now - said >= REPORT_S:
                said = now
                holder = os.pread(handle, 100, 0).decode("utf-8", "replace") or "another process"
                log.info("waiting %.0f s for %s to build %s in %s for %s", now - begun, holder,
                         key.model, key.precision, key.gpu)
            time.sleep(POLL_S)
            continue
        except OSError as error:
            log.info("the file system of the plan cache has no locks (%s)", error)
            return
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return


def _read(path: Path) -> tuple[dict[str, Any] | None, bytes]:
    """(head, plan) of a file that nobody else could have written; (None, b"") without a file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, b""
    except OSError as error:
        raise PlanUnusable(f"{path} cannot be opened ({error})") from error
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
            raise PlanUnusable(f"{path} belongs to user {found.st_uid}")
        if stat.S_IMODE(found.st_mode) & 0o022:
            raise PlanUnusable(f"{path} can be written by others")
        try:
            content = file.read()
        except OSError as error:
            raise PlanUnusable(f"{path} cannot be read ({error})") from error
    head, _, plan = content.removeprefix(MAGIC).partition(b"\n")
    try:
        table = json.loads(head) if content.startswith(MAGIC) else None
    except ValueError as error:
        raise PlanUnusable(f"{path} is damaged ({error})") from error
    if not isinstance(table, dict) or hashlib.sha256(plan).hexdigest() != table.get("sha256"):
        raise PlanUnusable(f"{path} is damaged or was not written by this program")
    return table, plan


def obtain(cache: PlanCache, key: Key, build: Callable[[], bytes],
           start: Callable[[bytes], T], notes: Callable[[T], Mapping[str, Any]]) -> T:
    """What ``start`` makes of the plan of ``key``: the cached one, else one built now.

    ``start`` loads a plan and checks its answers; it raises :class:`PlanUnusable` to refuse it.
    A cached plan that is refused is built again once; a fresh one that is refused is not kept and
    the refusal reaches the caller.  ``notes`` of the outcome are stored with the plan.
    """
    if cache.why_not:
        log.warning("no plan can be kept: %s; %s is built in memory by every process, which takes "
                    "long and may change last digits between ranks. Point $%s to a directory of "
                    "your own", cache.why_not, key.model, VARIABLE)
        return start(build())
    refused = ""
    for locked in (False, True):
        with cache.lock(key) if locked else contextlib.nullcontext():
            try:
                plan = cache.read(key)
                if plan is not None and hashlib.sha256(plan).hexdigest() != refused:
                    refused = hashlib.sha256(plan).hexdigest()
                    return start(plan)
            except PlanUnusable as error:
                log.warning("cached plan of %s is not used: %s; it is built again", key.model,
                            error)
            if locked:
                begun = time.monotonic()
                log.info("building %s in %s for %s", key.model, key.precision, key.gpu)
                cache.remove(key)
                plan = build()
                log.info("built %s in %.1f s, %.1f MB", key.model, time.monotonic() - begun,
                         len(plan) / 1e6)
                opened = start(plan)
                cache.write(key, plan, notes(opened))
                return opened
    raise AssertionError("unreachable")
