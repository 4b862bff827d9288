"""Named stages: where the time went, and where a crash happened."""
from __future__ import annotations

import time
from collections import defaultdict


class _Stage:
    """One named stage; entered hundreds of times a second, so no generator and no allocation."""

    __slots__ = ("_name", "_stages")

    def __init__(self, stages: Stages, name: str) -> None:
        self._stages, self._name = stages, name

    def __enter__(self) -> None:
        self._stages._begin()

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        self._stages._end(self._name, error)


class Stages:
    """Seconds spent per named stage, without those of the stages entered inside of it.

    An error that passes through gets a note that names the innermost stage and the event.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.event = ""
        self._named: dict[str, _Stage] = {}
        self._open: list[tuple[float, float]] = []     # start, seconds of inner stages before
        self._inner = 0.0                               # seconds of stages inside the current one

    def __call__(self, name: str) -> _Stage:
        stage = self._named.get(name)
        if stage is None:
            stage = self._named[name] = _Stage(self, name)
        return stage

    def _begin(self) -> None:
        self._open.append((time.perf_counter(), self._inner))
        self._inner = 0.0

    def _end(self, name: str, error: BaseException | None) -> None:
        start, inner_before = self._open.pop()
        whole = time.perf_counter() - start
        self.seconds[name] += whole - self._inner
        self._inner = inner_before + whole
        if error is not None and not getattr(error, "__notes__", ()):
            error.add_note(f"in stage {name!r}{self.event and f', {self.event}'}")
