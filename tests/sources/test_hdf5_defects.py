"""Broken HDF5 runs: nothing is read as data that is not data, and nothing hangs."""
from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conformance.source_conformance import summary, whole
from mockdata import hdf5_runs as mock

from xfel_classify.core import EventStatus, RunDamaged
from xfel_classify.sources.hdf5 import Source


def source(*files: Path, **options) -> Source:
    return Source(Source.Config(files=[str(f) for f in files], **options))


def statuses(opened: Source) -> list[EventStatus]:
    found = summary(opened.frames(whole(opened)))
    return [found[i][1] for i in range(opened.expected_events())]


@pytest.fixture
def tiny(tmp_path: Path) -> dict:
    return {"geometry": str(mock.write_geometry(tmp_path / "tiny.geom"))}


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.2])
def test_truncated_file(tmp_path, tiny, fraction):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(20))
    mock.truncate(path, fraction)
    with pytest.raises(RunDamaged, match=r"truncated: it records \d+ bytes and has"), \
            source(path, **tiny):
        pass


@pytest.mark.parametrize("content", [b"", b"not a file of that kind" * 99])
def test_not_hdf5(tmp_path, tiny, content):
    path = tmp_path / "run.h5"
    path.write_bytes(content)
    with pytest.raises(RunDamaged, match="not an HDF5 file"), source(path, **tiny):
        pass


@pytest.mark.parametrize("compression", ["gzip", "zstd", "bitshuffle"])
def test_corrupt_chunk_is_one_unreadable_row(tmp_path, tiny, compression, caplog):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(5), compression=compression)
    mock.corrupt_chunk(path, 2)
    with source(path, **tiny) as opened, caplog.at_level(logging.WARNING):
        found = statuses(opened)
    expected = [EventStatus.OK] * 5
    expected[2] = EventStatus.UNREADABLE
    assert found == expected
    assert "cannot be read" in caplog.text


def test_chunks_that_were_never_written_are_no_images(tmp_path, tiny):
    path = tmp_path / "run.h5"
    frames = mock.frames(3)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", (6, 2, 8, 16), "f4", chunks=(1, 1, 8, 16))
        data[:3] = frames
        data[4, 0] = frames[0, 0]
    with source(path, **tiny) as opened:
        none, half = EventStatus.NO_DETECTOR, EventStatus.WRONG_SHAPE
        assert statuses(opened) == [EventStatus.OK] * 3 + [none, half, none]
        assert any("3 of 6 events were never" in note for note in opened.run.notes)


def test_a_file_nobody_wrote_into(tmp_path, tiny):
    path = tmp_path / "run.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (6, 2, 8, 16), "f4")
    with pytest.raises(RunDamaged, match="no pixel was ever written"), source(path, **tiny):
        pass


def test_missing_part_of_a_virtual_dataset(tmp_path, tiny):
    frames = mock.frames(6)
    parts = [mock.write_stack(tmp_path / f"p{i}.h5", frames[2 * i:2 * i + 2]) for i in range(3)]
    path = mock.write_virtual(tmp_path / "virtual.h5", parts, frames.shape)
    with source(path, **tiny) as opened:
        assert statuses(opened) == [EventStatus.OK] * 6
    parts[1].unlink()
    with source(path, **tiny) as opened:
        bad = EventStatus.UNREADABLE
        assert statuses(opened) == [EventStatus.OK] * 2 + [bad] * 2 + [EventStatus.OK] * 2
        assert any("p1.h5" in note and "fill values" in note for note in opened.run.notes)
    mock.truncate(parts[2], 0.5)
    with source(path, **tiny) as opened:
        assert statuses(opened) == [EventStatus.OK] * 2 + [EventStatus.UNREADABLE] * 4
    for part in (parts[0], parts[2]):
        part.unlink()
    with pytest.raises(RunDamaged, match="no event of .* can be read"), source(path, **tiny):
        pass


def test_part_of_a_virtual_dataset_that_became_shorter(tmp_path, tiny):
    frames = mock.frames(4)
    parts = [mock.write_stack(tmp_path / f"p{i}.h5", frames[2 * i:2 * i + 2]) for i in range(2)]
    path = mock.write_virtual(tmp_path / "virtual.h5", parts, frames.shape)
    mock.write_stack(parts[1], frames[2:3])
    with source(path, **tiny) as opened:
        assert statuses(opened) == [EventStatus.OK] * 3 + [EventStatus.UNREADABLE]


def test_panels_that_no_part_holds(tmp_path, tiny):
    """A module missing from a virtual detector is an event of another shape, not zeros."""
    part = mock.write_stack(tmp_path / "p0.h5", mock.frames(3)[:, 0])
    layout = h5py.VirtualLayout((3, 2, 8, 16), "f4")
    layout[:2, 0] = h5py.VirtualSource(part.name, "data", shape=(3, 8, 16))[:2]
    path = tmp_path / "virtual.h5"
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("data", layout)
    with pytest.raises(RunDamaged, match="partly, mapped"), source(path, **tiny):
        pass


def test_virtual_over_virtual(tmp_path, tiny):
    frames = mock.frames(4)
    pixels = mock.write_stack(tmp_path / "pixels.h5", frames)
    inner = mock.write_virtual(tmp_path / "inner.h5", [pixels], frames.shape)
    outer = mock.write_virtual(tmp_path / "outer.h5", [inner], frames.shape)
    with source(outer, **tiny) as opened:
        assert statuses(opened) == [EventStatus.OK] * 4
    pixels.unlink()
    with pytest.raises(RunDamaged, match="pixels.h5"), source(outer, **tiny):
        pass


def test_dead_external_link(tmp_path, tiny):
    target = mock.write_stack(tmp_path / "pixels.h5", mock.frames(3))
    path = mock.write_linked_cxi(tmp_path / "linked.cxi", target)
    target.unlink()
    with pytest.raises(RunDamaged, match="link to pixels.h5:data"), source(path, **tiny):
        pass


def test_dead_nexus_part(tmp_path, tiny):
    parts = [mock.write_stack(tmp_path / f"part{i}.h5", mock.frames(2)) for i in range(2)]
    master = mock.write_nexus(tmp_path / "master.h5", parts)
    parts[1].unlink()
    with pytest.raises(RunDamaged, match="data_000002 are a link to part1.h5"), \
            source(master, **tiny):
        pass


def test_missing_raw_file_of_an_external_dataset(tmp_path, tiny):
    frames = mock.frames(2)
    path = tmp_path / "run.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=frames,
                            external=[(str(tmp_path / "pixels.raw"), 0, frames.nbytes)])
    with source(path, **tiny) as opened:
        assert statuses(opened) == [EventStatus.OK] * 2
    (tmp_path / "pixels.raw").unlink()
    with pytest.raises(RunDamaged, match="which is missing"), source(path, **tiny):
        pass


def test_links_in_circles_end(tmp_path, tiny):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(2), "a/data")
    with h5py.File(path, "r+") as file:
        file["a/again"] = h5py.SoftLink("/")
        file["a/same"] = h5py.SoftLink("/a/data")
    with source(path, **tiny) as opened:
        assert statuses(opened) == [EventStatus.OK] * 2


def test_empty_run(tmp_path, tiny):
    path = mock.write_stack(tmp_path / "run.h5", np.zeros((0, 2, 8, 16), "f4"))
    with source(path, **tiny) as opened:
        assert opened.expected_events() == 0
        assert summary(opened.frames(whole(opened))) == {}


FUZZ = """
import pathlib, random, shutil, sys
from xfel_classify.core import XfelClassifyError, Shard
from xfel_classify.sources.hdf5 import Source
good, work = map(pathlib.Path, sys.argv[1:3])
clean = good.read_bytes()
for seed in range(int(sys.argv[3])):
    rng = random.Random(seed)
    broken = bytearray(clean)
    for _ in range(rng.choice((1, 4, 32))):
        broken[rng.randrange(48, len(broken))] = rng.randrange(256)
    work.write_bytes(broken)
    print(seed, flush=True)
    try:
        with Source(Source.Config(files=[str(work)], panel_shape=None)) as source:
            n = source.expected_events()
            if n > 100: continue
            left = iter(range(n))
            for frame in source.frames(Shard(claim=lambda k: range(i, i + 1)
                                             if (i := next(left, None)) is not None else range(0))):
                pass
    except XfelClassifyError:
        pass
"""


def test_flipped_bytes_never_hang_or_escape(tmp_path):
    """Files with flipped bytes end in one of our errors or in rows, within the time limit."""
    good = tmp_path / "good.h5"
    mock.write_cxi(good, mock.frames(4))
    script = tmp_path / "fuzz.py"
    script.write_text(FUZZ, encoding="ascii")
    done = subprocess.run([sys.executable, str(script), str(good), str(tmp_path / "bad.h5"), "150"],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout[-20:]}\n{done.stderr[-3000:]}"
