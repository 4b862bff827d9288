"""What one rank does in the MPI tests: read a run through the source and write down what it saw.

``python psana2_rank.py OUT OPTIONS``; OPTIONS is JSON: {"config": {...}, "todo": [...],
"stop_after": n, "leave_after": n}.  Each rank writes OUT/rank<r>.json.
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
                if len(seen) == options.get("leave_after"):
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
