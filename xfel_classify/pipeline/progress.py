"""Progress of a run: a bar on a terminal, plain lines elsewhere."""
from __future__ import annotations

import logging
import sys
import time
from typing import Any

from .schedule import World

log = logging.getLogger(__name__)


class Progress:
    """Shows events/s, hit rate and time left of all ranks; one rank of a job has it on."""

    def __init__(self, world: World, total: int | None, done_before: int = 0, *,
                 shown: bool, every_s: float = 10.0) -> None:
        self._world = world
        self._total = total
        self._before = done_before
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._shown = shown
        self._every = every_s
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done_before, unit="event", smoothing=0.1,
                             mininterval=0.2, dynamic_ncols=True, file=sys.stderr)

    def update(self) -> None:
        """Show where the run stands, if it is time to."""
        if not self._shown:
            return
        now = time.monotonic()
        if now - self._last < (0.2 if self._bar is not None else self._every):
            return
        self._last = now
        events, hits = self._world.progress()
        if self._bar is not None:
            self._bar.n = self._before + events
            self._bar.set_postfix_str(f"hit rate {hits / max(events, 1):.1%}")
            self._bar.refresh()
            return
        rate = events / (now - self._start)
        text = f"{self._before + events} of {self._total or '?'} events, {rate:.1f} events/s"
        text += f", hit rate {hits / max(events, 1):.1%}"
        if self._total and rate:
            left = (self._total - self._before - events) / rate
            text += f", {int(left // 60)} min {int(left % 60):02d} s left"
        log.info("%s", text)

    def close(self) -> None:
        if self._bar is not None:
            events, _ = self._world.progress()
            self._bar.n = self._before + events
            self._bar.refresh()
            self._bar.close()
