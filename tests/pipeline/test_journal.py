"""Part files: what a crash, a truncation or a flipped bit leaves behind."""
import errno

import numpy as np
import pytest

from xfel_classify.core import OutputDamaged, OutputFull, Total
from xfel_classify.pipeline import journal
from xfel_classify.pipeline.journal import (
    KeptPixels,
    PartWriter,
    next_generation,
    read_part,
    read_parts,
)


def rows(first, n):
    index = np.arange(first, first + n)
    return {"timestamp": index * 10, "index": index, "score": index / 7,
            "peaks": [np.full(i % 3, i, np.float32) for i in index]}


def total(n):
    return {"sum": Total(np.full((2, 3), n, np.int64), "sum", n, 0.5, "keV", "a sum")}


def write(directory, checkpoints=3, totals=True, keep=()):
    writer = PartWriter(directory, rank=3, generation=1)
    for k in range(checkpoints):
        writer.add(rows(4 * k, 2))
        writer.add(rows(4 * k + 2, 2))
        for index in keep:
            if 4 * k <= index < 4 * k + 4:
                writer.keep(index, np.full((1, 2, 3), index, np.float32))
        writer.checkpoint(total(4 * (k + 1)) if totals else {}, {"wall_s": float(k)})
    writer.close()
    return directory / "rank0003.g1.journal"


def test_round_trip(tmp_path):
    part = read_part(write(tmp_path))
    assert part.rank == 3
    np.testing.assert_array_equal(part.rows["index"], np.arange(12))
    np.testing.assert_array_equal(part.rows["score"], np.arange(12) / 7)
    assert [row.tolist() for row in part.rows["peaks"]] == [[i] * (i % 3) for i in range(12)]
    assert part.totals["sum"].events == 12 and part.totals["sum"].scale == 0.5
    assert part.notes[-1]["wall_s"] == 2.0


def test_rows_after_the_last_checkpoint_never_happened(tmp_path):
    writer = PartWriter(tmp_path, 3, 1)
    writer.add(rows(0, 4))
    writer.checkpoint(total(4), {})
    writer.add(rows(4, 4))
    writer.close()
    assert read_part(tmp_path / "rank0003.g1.journal").rows["index"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("lost", [1, 10, 200])
def test_a_torn_last_record_falls_back_to_the_checkpoint_before(tmp_path, lost):
    """kill -9 in the middle of an append: the totals of the checkpoint before are still there."""
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-lost])
    part = read_part(path)
    assert part.rows["index"].tolist() == list(range(8))
    assert part.totals["sum"].events == 8


def test_every_truncation_gives_a_whole_prefix_or_nothing(tmp_path):
    path = write(tmp_path, totals=False)
    content = path.read_bytes()
    lengths = set()
    for size in range(0, len(content) + 1, 7):
        path.write_bytes(content[:size])
        part = read_part(path)
        lengths.add(0 if part is None else len(part.rows["index"]))
        if part is not None:
            assert part.rows["index"].tolist() == list(range(len(part.rows["index"])))
    assert lengths >= {0, 4, 8}


def test_a_flipped_bit_in_an_early_record_distrusts_rows_and_totals_together(tmp_path, caplog):
    path = write(tmp_path, checkpoints=4)
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    assert read_part(path) is None
    assert "not used" in caplog.text


def test_missing_totals_distrust_the_part(tmp_path, caplog):
    path = write(tmp_path)
    (tmp_path / "rank0003.g1.totals-3").unlink()
    assert read_part(path) is None
    assert "totals" in caplog.text


def test_kept_pixels_come_back_and_are_checked(tmp_path):
    write(tmp_path, keep=(1, 5, 6))
    parts = read_parts(tmp_path)
    kept = KeptPixels(parts, (1, 2, 3))
    assert 5 in kept and 4 not in kept
    np.testing.assert_array_equal(kept.read(6), np.full((1, 2, 3), 6, np.float32))
    pixels = tmp_path / "rank0003.g1.pixels"
    content = bytearray(pixels.read_bytes())
    content[-3] ^= 64
    pixels.write_bytes(content)
    with pytest.raises(OutputDamaged, match="--resume"):
        kept.read(6)
    assert read_parts(tmp_path, verify_pixels=True) == []
    pixels.write_bytes(content[:24])
    assert read_parts(tmp_path) == []


def test_a_rank_without_events_leaves_a_part_that_says_so(tmp_path):
    writer = PartWriter(tmp_path, 0, 1)
    writer.checkpoint({}, {"wall_s": 1.0})
    writer.close()
    part = read_part(tmp_path / "rank0000.g1.journal")
    assert part.rows == {} and part.notes == [{"totals": False, "wall_s": 1.0}]


def test_generations_do_not_collide(tmp_path):
    assert next_generation(tmp_path) == 1
    write(tmp_path)
    assert next_generation(tmp_path) == 2


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    writer = PartWriter(tmp_path, 0, 1)
    writer.add(rows(0, 4))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal.os, "fsync", full)
    with pytest.raises(OutputFull, match="(?s)No space left.*--resume"):
        writer.checkpoint(total(4), {})
