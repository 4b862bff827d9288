"""What one rank does in the MPI tests: read a run through the source and write down what it saw.

``python psana2_rank.py OUT OPTIONS``; OPTIONS is JSON: {"config": {...}, "todo": [...],
"stop_after": n, "leave_after": n, "leavers": [ranks],
"database": constants file that plays psana's database, "fail_after": n}.  Each rank writes
OUT/rank<r>.json.
"""
from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np

from xfel_classify.core import Shard, XfelClassifyError
from xfel_classify.sources.psana2 import Source

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))


def play_database(path: str) -> None:
    """Answer psana's requests for constants from a file, as its database would."""
    import h5py
    import psana.pscalib.calib.MDBWebUtils as web

    def constants(det: str, **_: object) -> dict:
        if not det.startswith("jungfrau"):
            return {}
        with h5py.File(path) as file:
            return {name: (value[()], {"ctype": name}) for name, value in
                    file["jungfrau"].items()}

    web.calib_constants_all_types = constants


def main() -> int:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    seen: list[list] = []
    answer: dict = {"rank": RANK}
    left = list(range(RANK, 10_000, SIZE))      # used only where psana deals nothing itself

    def claim(count: int) -> range:
        total = len(options["todo"]) if options.get("todo") is not None else answer["expected"]
        return range(left[0], left.pop(0) + 1) if left[0] < total else range(0)

    def stopping() -> bool:
        return options.get("stop_after") is not None and len(seen) >= options["stop_after"]

    if options.get("database"):
        play_database(options["database"])
    todo = None if options.get("todo") is None else np.array(options["todo"], np.int64)
    try:
        with Source(Source.Config(**options["config"])) as source:
            answer |= {"works": source.works(), "distributes": source.distributes,
                       "expected": source.expected_events(), "notes": source.run.notes}
            for frame in source.frames(Shard(claim, todo, stopping)):
                crc = None if frame.raw_PSF is None else zlib.crc32(
                    np.ascontiguousarray(frame.raw_PSF).tobytes())
                seen.append([frame.index, frame.timestamp, int(frame.status), frame.damage, crc,
                             dict(frame.scalars), list(frame.event_codes)])
                if len(seen) == options.get("fail_after") and RANK == 2:
                    raise RuntimeError("planted failure")
                if len(seen) == options.get("leave_after") and RANK in options.get(
                        "leavers", range(SIZE)):
                    break
            if source.works():
                answer["identity"] = source.constants().identity
    except XfelClassifyError as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    answer["seen"] = seen
    (out / f"rank{RANK}.json").write_text(json.dumps(answer), encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
