"""A whole run: prepare the output, loop on every rank, join, write.

``classify_run`` is what the command line calls and what a script may call; it is the only place
that knows of output directories, resuming and interruptions.
"""
from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..config import RunConfig, dumps
from ..core import (
    Analysis,
    Constants,
    EventSource,
    EventStatus,
    OutputError,
    OutputExists,
    RunInfo,
    Shard,
    Sink,
)
from ..engines.gpu_driver import take_place
from .join import done_indices, join_parts, write_outputs
from .journal import PartWriter, next_generation, output_error, read_parts
from .loop import EventLoop
from .manifest import MANIFEST, Manifest, read_manifest
from .progress import Progress
from .schedule import SERIAL, World, end_soon

log = logging.getLogger(__name__)

PENDING_ROWS = 4096
"""Rows that may wait in memory before a checkpoint is forced."""

GRACE_S = 20.0
"""How long ranks may take to flush after SIGTERM or SIGINT before all are ended."""


@dataclass(frozen=True)
class RunSummary:
    """What became of a run."""

    directory: Path
    files: tuple[Path, ...] = ()
    events: int = 0
    events_expected: int | None = None
    hits: int = 0
    status_counts: Mapping[str, int] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        return not self.interrupted and not self.unreadable and (
            self.events_expected is None or self.events >= self.events_expected)

    @property
    def unreadable(self) -> int:
        """Events that the run holds and whose pixels could not be read."""
        return self.status_counts.get(EventStatus.UNREADABLE.name, 0)

    @property
    def exit_code(self) -> int:
        """0 complete, 3 fewer analysed events than the run holds, 130 interrupted."""
        return 130 if self.interrupted else 0 if self.complete else 3


def classify_run(source: EventSource, analyses: Sequence[Analysis], sinks: Sequence[Sink], *,
                 out: Path | str | None = None, config: RunConfig | None = None,
                 mode: str = "new", world: World = SERIAL,
                 progress: bool = False) -> RunSummary:
    """Classify every event of ``source`` and leave the run's files in ``out``.

    ``mode`` is "new" (an existing output is an error), "resume" (do only what is missing) or
    "overwrite".  Called by all ranks of ``world``.  Raises errors of :mod:`xfel_classify.core`.
    """
    config = config or RunConfig()
    started = time.monotonic()
    with source, _signals(world) as stopping:
        run = source.run
        directory = Path(out) if out is not None else Path(f"{run.exp}_r{run.run:04d}")
        constants = world.share(source.constants)
        hits = hit_column(analyses, config)
        wants_pixels = any(getattr(sink, "wants_pixels", False) for sink in sinks)
        locate = getattr(source, "pixel_location", None)
        for sink in sinks:
            if hasattr(sink, "check"):
                sink.check(run, constants, locate)
        expected = source.expected_events()
        if expected is not None and config.loop.max_events is not None:
            expected = min(expected, config.loop.max_events)
        loop = EventLoop(source, analyses, batch=config.loop.batch,
                         keep=hits if wants_pixels else None,
                         common_mode_kinds=config.loop.common_mode,
                         mask_saturated=config.loop.mask_saturated,
                         photon_energy_eV=config.source.get("photon_energy_eV")
                         or constants.geometry.photon_energy_eV)
        attributes = _attributes(config)
        manifest = Manifest(run, loop.columns, attributes,
                            _fingerprint(run, config, loop.columns, constants, analyses),
                            hits, expected, constants)
        parts_directory = directory / f"{run.exp}_r{run.run:04d}.parts"
        plan = world.together(lambda: _prepare(directory, parts_directory, manifest, mode))
        if plan is None:
            return _finished_before(directory, run)
        generation, done = plan
        # None = the whole run, which a source that deals events itself need not filter
        todo = np.arange(expected) if expected is not None and config.loop.max_events else None
        if len(done):
            todo = np.setdiff1d(np.arange(expected if expected is not None else 0), done)
            log.info("resuming: %d of %s events are done", len(done), expected)
        world.reset()
        working = world.allgather(bool(source.works()))
        place = world.local_place(working[world.rank])
        if working[world.rank]:
            take_place(*place)
        writer = PartWriter(parts_directory, world.rank, generation)
        shown = progress and working[world.rank] and not any(working[:world.rank])
        bar = Progress(world, expected, len(done), shown=shown)
        recorder = _Recorder(loop, writer, bar, world, config.loop.checkpoint_s, hits)
        total = len(todo) if todo is not None else expected
        try:
            panels = None
            if working[world.rank]:
                loop.start(constants)
                panels = loop.panels()
            if todo is None or len(todo):
                loop.run(Shard(lambda n: world.claim(n, total if total is not None else 1 << 62),
                               todo, stopping, panels), recorder.deliver)
            if working[world.rank]:
                recorder.checkpoint()
        finally:
            writer.close()
            loop.close()
            bar.close()
        interrupted = any(world.allgather(stopping()))
        world.barrier()

        def join() -> RunSummary:
            if interrupted:
                done = done_indices(read_parts(parts_directory))
                return RunSummary(directory, events=len(done), interrupted=True,
                                  events_expected=expected, seconds=time.monotonic() - started)
            return join_run(directory, parts_directory, manifest, sinks, started=started,
                            locate=locate, keep_parts=config.loop.keep_parts)

        return world.together(join)


def join_run(directory: Path, parts_directory: Path, manifest: Manifest, sinks: Sequence[Sink], *,
             keep_parts: bool, started: float | None = None, locate: Any = None) -> RunSummary:
    """Join the parts of a run and write its outputs; parts of a complete run are removed."""
    started = time.monotonic() if started is None else started
    result = join_parts(read_parts(parts_directory), manifest.run, manifest.columns,
                        manifest.attributes, hits=manifest.hits, constants=manifest.constants,
                        events_expected=manifest.events_expected, locate=locate)
    files = write_outputs(result, sinks, directory)
    counts = np.bincount(result.rows["status"], minlength=len(EventStatus))
    summary = RunSummary(
        directory, tuple(files), len(result), manifest.events_expected, len(result.kept),
        {status.name: int(counts[status]) for status in EventStatus if counts[status]},
        seconds=time.monotonic() - started)
    if summary.complete and not keep_parts:
        shutil.rmtree(parts_directory)
    return summary


class _Recorder:
    """Takes the rows of the loop to the part file and decides when to make them durable."""

    def __init__(self, loop: EventLoop, writer: PartWriter, bar: Progress, world: World,
                 checkpoint_s: float, hits: str | None) -> None:
        self._loop, self._writer, self._bar, self._world = loop, writer, bar, world
        self._interval = checkpoint_s
        self._hits = hits
        self._start = self._last = time.monotonic()

    def deliver(self, rows: dict[str, Any], kept: Iterable) -> None:
        self._writer.add(rows)
        for index, pixels_PSF in kept:
            self._writer.keep(index, pixels_PSF)
        hits = int(np.count_nonzero(np.nan_to_num(rows[self._hits]) > 0)) if self._hits else 0
        self._world.advance(len(rows["timestamp"]), hits)
        self._bar.update()
        now = time.monotonic()
        if now - self._last > self._interval or self._writer.pending > PENDING_ROWS:
            self.checkpoint()
            # totals of large detectors take a while to write: never more than 5 % of the time
            self._last = time.monotonic()
            self._interval = max(self._interval, 20 * (self._last - now))

    def checkpoint(self) -> None:
        with self._loop.stages("checkpoint"):
            self._writer.checkpoint(self._loop.totals(), {
                "attributes": {key: value for analysis in self._loop.analyses
                               for key, value in analysis.attributes().items()},
                "stages": dict(self._loop.stages.seconds),
                "wall_s": time.monotonic() - self._start,
            })


@contextmanager
def _signals(world: World) -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request that every rank sees.

    Yields ``stopping()``.
    """
    caught: list[int] = []
    seen = {"at": 0.0, "stop": False, "told": False}

    def note(number: int, _: Any) -> None:
        if caught:
            world.abort(130)            # a second signal: now
        caught.append(number)
        end_soon(GRACE_S, 130)

    def stopping() -> bool:
        if caught and not seen["told"]:
            seen["told"] = True
            world.stop()
        now = time.monotonic()
        if not seen["stop"] and (caught or now - seen["at"] > 0.1):
            seen["at"] = now
            seen["stop"] = world.stopping()
        return bool(seen["stop"])

    before = {}
    # mpirun kills its ranks one second after SIGTERM; SIGUSR1 it forwards and leaves them time
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        try:
            before[number] = signal.signal(number, note)
        except ValueError:
            break                       # not the main thread: the embedding program handles them
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


HIT_COLUMNS = ("hit/label", "quality/label", "peaks/hit")
"""What says which events are hits, the best first: a hit model, a model that tells good single
particles, a peak finder."""


def hit_column(analyses: Sequence[Analysis], config: RunConfig) -> str | None:
    """The column that says what a hit is; None where no analysis does."""
    columns = [name for analysis in analyses for name in analysis.columns]
    if config.loop.hits != "auto":
        return config.loop.hits
    return next((name for name in HIT_COLUMNS if name in columns), None)


def _prepare(directory: Path, parts: Path, manifest: Manifest,
             mode: str) -> tuple[int, np.ndarray] | None:
    """Rank 0: make the output ready; (generation, done events), or None when all is done."""
    run = manifest.run
    summary = directory / f"{run.exp}_r{run.run:04d}.h5"
    if mode == "new" and (summary.exists() or parts.exists()):
        state = "an unfinished" if parts.exists() else "a finished"
        raise OutputExists(
            f"{directory} already holds {state} run {run.run} of {run.exp}; continue it with "
            "--resume, replace it with --overwrite, or choose another directory with -o"
        )
    try:
        if mode == "overwrite" and parts.exists():
            shutil.rmtree(parts)
        if mode == "resume" and summary.exists() and not parts.exists():
            return None
        parts.mkdir(parents=True, exist_ok=True)
        if (parts / MANIFEST).exists():
            read_manifest(parts).must_match(manifest, parts)
        manifest.write(parts)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise output_error(error, directory) from error
    existing = read_parts(parts, verify_pixels=True)
    trusted = {part.path.name for part in existing}
    for stale in parts.glob("rank*.journal"):
        if stale.name not in trusted:
            for piece in parts.glob(stale.name.removesuffix("journal") + "*"):
                piece.unlink()
    return next_generation(parts), done_indices(existing)


def _fingerprint(run: RunInfo, config: RunConfig, columns: Mapping[str, Any],
                 constants: Constants, analyses: Sequence[Analysis]) -> dict[str, str]:
    """What must be the same for two parts to belong to one run."""
    return {
        "experiment and run": f"{run.exp} {run.run} {run.detector}",
        "analyses": _digest([config.analyses, config.loop.common_mode,
                             config.loop.mask_saturated]),
        "columns": _digest({name: msgspec.to_builtins(column)
                            for name, column in columns.items()}),
        "constants": constants.identity,
        "models": _digest([getattr(analysis, "model_sha256", "") for analysis in analyses]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _attributes(config: RunConfig) -> dict[str, Any]:
    return {
        "configuration": dumps(config),
        "xfel_classify_version": version("xfel-classify"),
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
    }


def _finished_before(directory: Path, run: RunInfo) -> RunSummary:
    """The summary of a run that needs nothing more."""
    import h5py

    stem = f"{run.exp}_r{run.run:04d}"
    with h5py.File(directory / f"{stem}.h5") as file:
        events, expected = int(file.attrs["events"]), int(file.attrs["events_expected"])
        hits = int(file.attrs.get("hits", 0))
    return RunSummary(directory, tuple(sorted(directory.glob(f"{stem}*"))), events,
                      None if expected < 0 else expected, hits)
