"""What every sink promises; subclass and define the fixture ``sink``."""
from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from mockdata.hand_result import empty_result, hand_result

from xfel_classify.core import OutputError, Sink


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class SinkConformance:
    """Subclass with a fixture ``sink`` returning a sink ready to write."""

    @pytest.fixture
    def sink(self) -> Sink:
        raise NotImplementedError

    def test_it_writes_what_it_names_and_nothing_else(self, sink: Sink, tmp_path: Path) -> None:
        names = sink.write(hand_result(), tmp_path)
        assert names and all(name.startswith("mfxl1033223_r0095") for name in names)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}.tmp" for n in names)

    def test_equal_rows_give_equal_bytes(self, sink: Sink, tmp_path: Path) -> None:
        names = sink.write(hand_result(), tmp_path)
        first = {name: digest(tmp_path / f"{name}.tmp") for name in names}
        assert {name: digest(tmp_path / f"{name}.tmp")
                for name in sink.write(hand_result(), tmp_path)} == first

    @pytest.mark.parametrize("events", [0, 1])
    def test_a_run_without_hits_has_the_same_files(
        self, sink: Sink, tmp_path: Path, events: int
    ) -> None:
        assert sink.write(empty_result(events), tmp_path) == sink.write(hand_result(), tmp_path)

    def test_an_experiment_may_have_any_name(self, sink: Sink, tmp_path: Path) -> None:
        for name in sink.write(hand_result(exp="größe λ"), tmp_path):
            assert name.startswith("größe λ_r0095")
            assert (tmp_path / f"{name}.tmp").stat().st_size > 0

    def test_columns_without_rows_are_no_obstacle(self, sink: Sink, tmp_path: Path) -> None:
        rows = {name: hand_result().rows[name] for name in ("timestamp", "index", "status")}
        assert sink.write(hand_result(rows=rows), tmp_path)

    def test_missing_directory_is_an_output_error(self, sink: Sink, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="does not exist"):
            sink.write(hand_result(), tmp_path / "nowhere")

    def test_directory_that_refuses_is_an_output_error(self, sink: Sink) -> None:
        with pytest.raises(OutputError, match="cannot be written"):
            sink.write(hand_result(), Path("/proc/self"))

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
    def test_full_disk(self, sink: Sink, tmp_path: Path, share: float) -> None:
        """Under a file size limit the sink says so, leaves nothing, and the process lives on."""
        written = max((tmp_path / f"{n}.tmp").stat().st_size
                      for n in sink.write(hand_result(), tmp_path))
        for path in tmp_path.iterdir():
            path.unlink()
        limit = int(share * written)
        program = textwrap.dedent(f"""
            import resource, sys
            sys.path.insert(0, {str(Path(__file__).parents[1])!r})
            from pathlib import Path
            from mockdata.hand_result import hand_result
            from xfel_classify.core import OutputFull
            from {type(sink).__module__} import Sink
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
            try:
                Sink().write(hand_result(), Path(sys.argv[1]))
            except OutputFull as error:
                sys.exit(7 if "--resume" in str(error) else 8)
        """)
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 7, done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_rows_are_not_changed(self, sink: Sink, tmp_path: Path) -> None:
        result, untouched = hand_result(), hand_result()
        sink.write(result, tmp_path)
        for name, values in untouched.rows.items():
            for mine, before in zip(result.rows[name], values, strict=True):
                np.testing.assert_array_equal(mine, before)
