"""Named stages: where the time went, and where a crash happened."""
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Seconds spent per named stage.  An error that passes through names its stage and event."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.event = ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except BaseException as error:
            place = f"in stage {name!r}{self.event and f', {self.event}'}"
            if place not in getattr(error, "__notes__", ()):
                error.add_note(place)
            raise
        finally:
            self.seconds[name] += time.perf_counter() - start
