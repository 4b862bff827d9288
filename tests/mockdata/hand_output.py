"""An output directory made from the result by hand, with all of its files."""
from __future__ import annotations

from pathlib import Path

from mockdata.hand_result import hand_result

from xfel_classify.sinks import cxi, event_lists, geometry, summary

STEM = "mfxl1033223_r0095"


def write_output(directory: Path, result=None, *, link: bool = False) -> Path:
    """Write every file; returns the path of the summary."""
    directory.mkdir(parents=True, exist_ok=True)
    result = hand_result() if result is None else result
    for sink in (cxi.Sink(cxi.Sink.Config(link=link)), event_lists.Sink(), geometry.Sink(),
                 summary.Sink()):
        for name in sink.write(result, directory):
            (directory / f"{name}.tmp").rename(directory / name)
    return directory / f"{result.stem}.h5"
