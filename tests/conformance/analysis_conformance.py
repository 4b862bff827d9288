"""What every analysis must do, whichever it is: subclass once per analysis."""
from __future__ import annotations

import numpy as np

from xfel_classify.core import Batch, Frame, RunInfo, Total
from xfel_classify.pipeline.loop import OpenFrame
from xfel_classify.pipeline.stages import Stages


class AnalysisConformance:
    """A subclass gives ``make()`` (a new analysis), ``constants()`` and ``frames()`` (N, P, S, F).

    ``earlier`` holds the columns that the analysis uses, N rows each.
    """

    earlier: dict[str, np.ndarray] = {}

    def make(self):
        raise NotImplementedError

    def constants(self):
        raise NotImplementedError

    def frames(self) -> np.ndarray:
        raise NotImplementedError

    def run(self) -> RunInfo:
        shape = self.constants().shape
        return RunInfo("test", 1, "detector", "generic", shape, "float32", "memory")

    def answers(self, batch: int, skip: tuple[int, ...] = ()):
        """({column: rows of all frames}, totals) with ``batch`` frames at a time."""
        analysis, constants, frames = self.make(), self.constants(), self.frames()
        analysis.start(self.run(), constants, batch)
        view = OpenFrame(constants, Stages())
        found: dict[str, list] = {name: [] for name in analysis.columns}
        buffer = np.empty_like(frames[0])
        for start in range(0, len(frames), batch):
            rows = range(start, min(start + batch, len(frames)))
            selected = np.array([row not in skip for row in rows])
            for slot, row in enumerate(rows):
                if selected[slot]:
                    buffer[...] = frames[row]
                    view.load(Frame(buffer, 100 + row, row), buffer, 9500.0,
                              {k: v[start:] for k, v in self.earlier.items()}, slot)
                    analysis.take(view, slot)
                    buffer[...] = 0         # the source's buffer is used again at once
            one = Batch(np.array(rows) + 100, np.array(rows), np.zeros(len(rows), np.uint8),
                        selected, {})
            answer = analysis.process(one)
            assert set(answer) == set(analysis.columns)
            for name, values in answer.items():
                assert len(values) == len(rows), name
                found[name] += list(values)
        totals = dict(analysis.totals())
        analysis.attributes()
        analysis.close()
        analysis.close()
        return found, totals

    def test_columns_are_declared_whole(self):
        analysis = self.make()
        for name, column in analysis.columns.items():
            assert name == name.strip("/") and column.doc, name
            np.dtype(column.dtype)
            if not column.ragged:
                np.full(column.shape, column.missing, column.dtype)
        assert analysis.name and isinstance(analysis.only, str)
        assert analysis.totals() == {}, "an analysis that was not started has no totals"

    def test_batches_do_not_matter(self):
        alone, totals_alone = self.answers(1)
        together, totals = self.answers(64)
        uneven, _ = self.answers(3)
        for name in alone:
            for a, b, c in zip(alone[name], together[name], uneven[name], strict=True):
                np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)
                np.testing.assert_allclose(a, c, atol=1e-6, err_msg=name)
        for name, total in totals.items():
            assert isinstance(total, Total)
            np.testing.assert_array_equal(total.values, totals_alone[name].values)

    def test_rows_that_are_not_selected_do_not_disturb_the_others(self):
        every, _ = self.answers(4)
        some, _ = self.answers(4, skip=(0, 2))
        for name in every:
            for row in range(len(self.frames())):
                if row not in (0, 2):
                    np.testing.assert_allclose(some[name][row], every[name][row], atol=1e-6,
                                               err_msg=f"{name} row {row}")

    def test_masked_pixels_change_nothing(self):
        before, totals_before = self.answers(4)
        frames = self.frames()
        bad = ~self.constants().good_PSF
        assert bad.any()
        for value in (1e6, np.nan, -np.inf):
            frames[:, bad] = value
            self.frames = lambda frames=frames: frames.copy()
            after, totals = self.answers(4)
            for name in before:
                for a, b in zip(before[name], after[name], strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=name)
            for name, total in totals.items():
                np.testing.assert_array_equal(total.values, totals_before[name].values)
