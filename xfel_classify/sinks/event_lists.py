"""Lists of the hits of a run, for programs that read the pixels elsewhere.

``{stem}.lst``        CrystFEL's list: one line per hit, ``/path/to/{stem}.cxi //k``, k = frame.
                      Absolute paths, so ``indexamajig -i`` works from any directory, also when a
                      workflow such as LUTE starts it; after moving the directory use
                      ``indexamajig --basename --prefix=DIR/``, or ``paths = "relative"``, which
                      works inside the directory wherever it is.
``{stem}_hits.npy``   uint64 time stamps, sorted: ``DataSource(exp=..., run=..., timestamps=PATH)``
                      of psana2 re-reads only these events.  No pickle inside.
``{stem}_hits.txt``   lines "run index": run number and position of the event in the run, from 0.
"""
from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from ..core import RunResult
from .staging import staged_bytes


class Sink:
    """Writes ``{stem}.lst``, ``{stem}_hits.npy`` and ``{stem}_hits.txt``."""

    name = "event_lists"

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """How the lists are written."""

        paths: Literal["absolute", "relative"] = "absolute"     # of the CXI file in the .lst
        cxi: bool = True        # write the .lst; false when no CXI file is written

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def write(self, result: RunResult, directory: Path) -> list[str]:
        """Write the ``.tmp`` files; returns the final names.  Raises :class:`OutputError`."""
        directory = Path(directory)
        rows = np.unique(np.asarray(result.kept, np.int64))
        stamps = np.sort(np.asarray(result.rows["timestamp"], np.int64)[rows]).astype(np.uint64)
        array_file = io.BytesIO()
        np.save(array_file, stamps, allow_pickle=False)
        cxi = f"{result.stem}.cxi"
        if self.config.paths == "absolute":
            cxi = str(directory.absolute() / cxi)
        contents = {
            f"{result.stem}_hits.npy": array_file.getvalue(),
            f"{result.stem}_hits.txt": "".join(
                f"{result.run.run} {index}\n" for index in np.asarray(result.rows["index"])[rows]
            ).encode(),
        }
        if self.config.cxi:
            contents[f"{result.stem}.lst"] = "".join(
                f"{cxi} //{frame}\n" for frame in range(len(rows))
            ).encode("utf-8", "surrogateescape")
        written: list[str] = []
        try:
            for name, content in contents.items():
                staged_bytes(directory, name, content)
                written.append(name)
        finally:
            if len(written) < len(contents):
                for name in written:
                    (directory / f"{name}.tmp").unlink(missing_ok=True)
        return written
