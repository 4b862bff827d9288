"""Run by the tests under mpirun: classify a tiny run, slowly or badly on request."""
import argparse
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mockdata.tiny_run import MeanAnalysis, RaggedAnalysis, TinySource

from xfel_classify.config import LoopConfig, RunConfig
from xfel_classify.pipeline import schedule
from xfel_classify.pipeline.run import classify_run
from xfel_classify.sinks.cxi import Sink as Cxi
from xfel_classify.sinks.summary import Sink as Summary


class SlowSource(TinySource):
    """Sleeps at every event; kills its own rank at event ``kill_at``, if rank ``kill_rank``."""

    def __init__(self, n, pause, kill_after, **kwargs):
        super().__init__(n, **kwargs)
        self._pause, self._kill_after = pause, kill_after

    def frames(self, shard):
        for frame in super().frames(shard):
            time.sleep(self._pause)
            if self._kill_after is not None and len(self.read) > self._kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield frame


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--events", type=int, default=60)
    p.add_argument("--pause", type=float, default=0.0)
    p.add_argument("--mode", default="new")
    p.add_argument("--fail-at", type=int)
    p.add_argument("--kill-rank", type=int)
    p.add_argument("--kill-after", type=int, default=3)
    p.add_argument("--checkpoint", type=float, default=20.0)
    a = p.parse_args()
    schedule.end_all_on_uncaught_errors()
    world = schedule.world()
    source = SlowSource(a.events, a.pause, a.kill_after if world.rank == a.kill_rank else None,
                        fail_at=a.fail_at)
    summary = classify_run(
        source, [MeanAnalysis(limit=a.events / 2), RaggedAnalysis()],
        [Summary(Summary.Config()), Cxi(Cxi.Config())], out=a.out, mode=a.mode, world=world,
        config=RunConfig(loop=LoopConfig(batch=4, checkpoint_s=a.checkpoint)))
    if world.rank == 0:
        print(f"events {summary.events} hits {summary.hits}", flush=True)
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main())
