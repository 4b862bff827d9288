"""HDF5 runs: every layout, what they carry, and what the source says about broken ones."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conformance.source_conformance import SourceConformance, part, summary, whole
from mockdata import hdf5_runs as mock

from xfel_classify.core import (
    ConfigurationError,
    ConstantsError,
    DetectorNotFound,
    EventStatus,
    GeometryError,
    RunNotFound,
    Shard,
)
from xfel_classify.sources.hdf5 import Source

SHARED = Path(__file__).resolve().parents[2] / "../shared"


def source(*files: Path, **options) -> Source:
    return Source(Source.Config(files=[str(f) for f in files], **options))


def read(opened: Source, **shard) -> dict[int, np.ndarray | None]:
    """Pixels of all events, copied."""
    found = whole(opened)
    shard = Shard(claim=found.claim, **shard)
    return {f.index: None if f.raw_PSF is None else f.raw_PSF.copy()
            for f in opened.frames(shard)}


@pytest.fixture
def geometry(tmp_path: Path) -> Path:
    return mock.write_geometry(tmp_path / "tiny.geom")


class TestStackConforms(SourceConformance):
    @pytest.fixture
    def again(self, tmp_path, geometry):
        first = mock.write_stack(tmp_path / "a.h5", mock.frames(5), stamps_N=mock.stamps(5))
        second = mock.write_stack(tmp_path / "b.h5", mock.frames(4, seed=2),
                                  stamps_N=mock.stamps(4, start=1_100_000_001))
        return lambda: source(first, second, geometry=str(geometry))


class TestLinkedCxiConforms(SourceConformance):
    @pytest.fixture
    def again(self, tmp_path, geometry):
        target = mock.write_stack(tmp_path / "pixels.h5", mock.frames(6), compression="zstd")
        linked = mock.write_linked_cxi(tmp_path / "linked.cxi", target)
        return lambda: source(linked, geometry=str(geometry))


# --- layouts ---

@pytest.mark.parametrize("compression", [None, "gzip", "lz4", "zstd", "bitshuffle"])
def test_plain_stack(tmp_path, geometry, compression):
    frames = mock.frames(4)
    path = mock.write_stack(tmp_path / "run.h5", frames, compression=compression)
    with source(path, geometry=str(geometry)) as opened:
        assert opened.run.panel_shape == (2, 8, 16)
        for index, pixels in read(opened).items():
            assert np.array_equal(pixels, frames[index])


def test_stack_of_single_panels(tmp_path, geometry):
    frames = mock.frames(3, panels=1)[:, 0]
    path = mock.write_stack(tmp_path / "run.h5", frames)
    with source(path, detector="assembled", pixel_size_m=1e-4) as opened:
        assert opened.run.panel_shape == (1, 8, 16)
        assert np.array_equal(read(opened)[2][0], frames[2])


def test_leading_panel_axes_are_flattened(tmp_path):
    frames = np.random.default_rng(3).integers(-50, 900, (2, 4, 8, 185, 388)).astype("i2")
    path = mock.write_stack(tmp_path / "cspad.h5", frames)
    with source(path) as opened:
        assert opened.run.detector_kind == "cspad"
        assert opened.run.panel_shape == (32, 185, 388)
        assert opened.constants().calibrated
        assert np.array_equal(read(opened)[1], frames[1].reshape(32, 185, 388))
        some = read(opened, panels=(3, 9))[1]
        assert np.array_equal(some[[3, 9]], frames[1].reshape(32, 185, 388)[[3, 9]])


def test_panels_stacked_along_rows_are_told_apart(tmp_path):
    frames = np.random.default_rng(3).random((2, 2, 512, 1024)).astype("f4")
    path = mock.write_cxi(tmp_path / "cxitst95_r0095.cxi", frames)
    with source(path) as opened:
        assert opened.run.detector_kind == "jungfrau"
        assert (opened.run.exp, opened.run.run) == ("cxitst95", 95)
        assert np.array_equal(read(opened)[1], frames[1])
        assert np.array_equal(read(opened, panels=(1,))[1][1], frames[1, 1])
        assert opened.constants().unit == "keV"


def test_cheetah_slab_of_the_cspad(tmp_path):
    slab = np.arange(1480 * 1552, dtype="f4").reshape(1, 1480, 1552)
    path = mock.write_stack(tmp_path / "cheetah.h5", slab, "entry_1/data_1/data")
    with source(path) as opened:
        assert opened.run.panel_shape == (32, 185, 388)
        assert sorted(read(opened)[0].ravel()) == sorted(slab.ravel())


def test_cxi_carries_times_scalars_codes_and_mask(tmp_path, geometry):
    frames = mock.frames(4)
    mask = np.zeros((16, 16), np.uint16)
    mask[0, :3] = 1
    path = mock.write_cxi(tmp_path / "x.cxi", frames, mask=mask)
    with source(path, geometry=str(geometry), panel_shape=(2, 8, 16)) as opened:
        assert opened.run.exp == "cxitst95"
        found = list(opened.frames(whole(opened)))
        assert [f.timestamp for f in found] == mock.stamps(4).tolist()
        assert [f.scalars["photon_energy_eV"] for f in found] == [9500, 9501, 9502, 9503]
        assert found[0].scalars["distance_m"] == pytest.approx(0.15)
        assert [f.event_codes for f in found] == [(0,), (1,), (2,), (3,)]
        good = opened.constants().good_PSF
        assert not good[0, 0, :3].any()
        assert good.sum() == good.size - 3


def test_mask_of_every_frame_becomes_nan(tmp_path, geometry):
    frames = mock.frames(3)
    mask = np.zeros((3, 16, 16), np.uint8)
    mask[1, 2, 5] = 1
    path = mock.write_cxi(tmp_path / "x.cxi", frames, mask=mask)
    with source(path, geometry=str(geometry), panel_shape=(2, 8, 16)) as opened:
        pixels = read(opened)
        assert np.isnan(pixels[1][0, 2, 5])
        assert np.isfinite(pixels[0]).all() and np.isnan(pixels[1]).sum() == 1


def test_masks_are_combined(tmp_path, geometry):
    mask = np.zeros((16, 16), np.uint16)
    mask[0, 0] = 1                                          # CXI: 1 = bad
    path = mock.write_cxi(tmp_path / "x.cxi", mock.frames(2), mask=mask)
    user = np.ones((2, 8, 16), bool)
    user[1, 4, 4] = False                                   # NumPy: 0 = bad
    np.save(tmp_path / "mask.npy", user)
    options = {"geometry": str(geometry), "panel_shape": (2, 8, 16)}
    with source(path, mask=str(tmp_path / "mask.npy"), edge_width=2, **options) as opened:
        good = opened.constants().good_PSF
    expected = np.zeros((2, 8, 16), bool)
    expected[:, 2:6, 2:14] = True
    expected[1, 4, 4] = False
    assert np.array_equal(good, expected)


def test_raw_frames_take_the_mask_of_the_first_event(tmp_path, geometry):
    frames = mock.frames(2, "u2")
    mask = np.zeros((2, 16, 16), np.uint8)
    mask[0, 0, 3] = mask[1, 5, 5] = 1
    path = mock.write_cxi(tmp_path / "x.cxi", frames, mask=mask)
    constants = tmp_path / "constants.h5"
    with h5py.File(constants, "w") as file:
        file["generic/pedestals"] = np.full((1, 2, 8, 16), 100, np.float32)
    with source(path, geometry=str(geometry), panel_shape=(2, 8, 16), kind="generic",
                constants=str(constants)) as opened:
        assert read(opened)[1].dtype == np.uint16
        good = opened.constants().good_PSF
        assert not good[0, 0, 3] and good[0, 5, 5]
        assert opened.constants().unit == "ADU"             # no gains, so no energies
        assert any("first event" in note for note in opened.run.notes)


def test_damage_and_absence_that_the_file_states(tmp_path, geometry):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(4), "jungfrau/raw")
    with h5py.File(path, "r+") as file:
        file["jungfrau/damage"] = [0, 4, 0, 0]
        file["jungfrau/present"] = [1, 1, 0, 1]
    for damaged, second in (("flag", EventStatus.DAMAGED), ("analyse", EventStatus.OK)):
        with source(path, geometry=str(geometry), damaged=damaged) as opened:
            found = summary(opened.frames(whole(opened)))
            assert [found[i][1] for i in range(4)] == [
                EventStatus.OK, second, EventStatus.NO_DETECTOR, EventStatus.OK]
            assert [found[i][2] for i in range(4)] == [0, 4, 0, 0]


def test_a_glob_leaves_truth_and_constants_out(tmp_path, geometry):
    mock.write_stack(tmp_path / "x-r0001.h5", mock.frames(2))
    mock.write_stack(tmp_path / "x-r0001-truth.h5", mock.frames(2))
    mock.write_stack(tmp_path / "constants.h5", mock.frames(2))
    with source(tmp_path / "*.h5", geometry=str(geometry)) as opened:
        assert opened.expected_events() == 2


def test_more_files_than_are_kept_open(tmp_path, geometry):
    frames = mock.frames(40)
    files = [mock.write_stack(tmp_path / f"r{n:02d}.h5", frames[n:n + 1]) for n in range(40)]
    with source(*files, geometry=str(geometry)) as opened:
        pixels = read(opened)
        assert all(np.array_equal(pixels[n], frames[n]) for n in range(40))
        assert opened.pixel_location(0) == (str(files[0].resolve()), "/data", 0)


def test_nexus_parts_in_other_files(tmp_path, geometry):
    frames = mock.frames(6)
    parts = [mock.write_stack(tmp_path / f"part{i}.h5", frames[3 * i:3 * i + 3]) for i in range(2)]
    master = mock.write_nexus(tmp_path / "master.h5", parts)
    with source(master, geometry=str(geometry)) as opened:
        pixels = read(opened)
        assert all(np.array_equal(pixels[i], frames[i]) for i in range(6))
        frame = next(iter(opened.frames(part([4]))))
        assert frame.scalars["photon_energy_eV"] == pytest.approx(12398.42 / 1.2, rel=1e-6)
        assert frame.scalars["distance_m"] == pytest.approx(0.123)
        assert opened.pixel_location(4) == (str(parts[1].resolve()), "/data", 1)


def test_a_lone_two_dimensional_image(tmp_path):
    image = np.random.default_rng(1).random((48, 64)).astype("f8")
    path = mock.write_stack(tmp_path / "one.h5", image)
    with source(path, detector="assembled", pixel_size_m=1e-4, beam_center_px=(30.5, 20.5),
                distance_m=0.2, wavelength_A=1.3) as opened:
        assert opened.expected_events() == 1
        assert opened.run.raw_dtype == "float32"
        assert np.allclose(read(opened)[0][0], image)
        geometry = opened.constants().geometry
        assert geometry.distance_m == 0.2
        assert abs(geometry.x_m_PSF[0, 20, 30]) < 1e-9
        assert abs(geometry.y_m_PSF[0, 20, 30]) < 1e-9
        frame = next(iter(opened.frames(whole(opened))))
        assert frame.scalars["photon_energy_eV"] == pytest.approx(12398.42 / 1.3, rel=1e-6)


def test_thermolysin_frames_need_no_special_case():
    path = SHARED / "data/real/cspad_thermolysin/cspad_thermolysin.h5"
    if not path.exists():
        pytest.skip("the real CSPAD frames are not here")
    with source(path, distance_m=0.1301) as opened:
        assert opened.run.detector_kind == "cspad"
        assert opened.constants().unit == "ADU"
        with h5py.File(path) as file:
            assert np.array_equal(read(opened)[0], file["data"][0].reshape(32, 185, 388))
        frame = next(iter(opened.frames(whole(opened))))
        assert frame.scalars["photon_energy_eV"] == pytest.approx(12398.42 / 1.2726, rel=1e-4)


def test_globs_and_order_of_files(tmp_path, geometry):
    for number in (2, 1):
        mock.write_stack(tmp_path / f"r{number}.h5", mock.frames(2, seed=number))
    with source(tmp_path / "r*.h5", geometry=str(geometry)) as opened:
        assert opened.expected_events() == 4
        assert np.array_equal(read(opened)[0], mock.frames(2, seed=1)[0])
        assert "r1.h5" in opened.run.provenance["source_files"]


def test_events_are_numbered_in_time_order(tmp_path, geometry):
    frames = mock.frames(4)
    times = np.array([30, 10, 30, 20], np.uint64)
    path = mock.write_stack(tmp_path / "run.h5", frames, stamps_N=times)
    with source(path, geometry=str(geometry)) as opened:
        found = {f.index: (f.timestamp, f.raw_PSF.copy()) for f in opened.frames(whole(opened))}
        assert [found[i][0] for i in range(4)] == [10, 20, 30, 30]
        for index, position in enumerate([1, 3, 0, 2]):
            assert np.array_equal(found[index][1], frames[position])
            assert opened.pixel_location(index)[2] == position
        assert any("repeat" in note for note in opened.run.notes)


def test_truth_in_a_simulated_file_is_not_read(tmp_path, geometry):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(2))
    with h5py.File(path, "r+") as file:
        file["truth/data"] = mock.frames(2, seed=9)
        file["truth/photon_energy_eV"] = np.full(2, 1234.0)
        file["truth/timestamp"] = np.array([7, 8])
    with source(path, geometry=str(geometry)) as opened:
        frame = next(iter(opened.frames(whole(opened))))
        assert "photon_energy_eV" not in frame.scalars
        assert frame.timestamp == 0


# --- what the user states ---

def test_several_candidates_are_named(tmp_path, geometry):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(2), "front/raw")
    with h5py.File(path, "r+") as file:
        file["back/raw"] = mock.frames(2, seed=5)
    with pytest.raises(DetectorNotFound, match=r"back/raw .*front/raw .*source\.dataset"), \
            source(path):
        pass
    with source(path, dataset="/back/raw", geometry=str(geometry)) as opened:
        assert np.array_equal(read(opened)[0], mock.frames(2, seed=5)[0])


def test_a_dataset_that_is_not_there(tmp_path):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(2))
    with pytest.raises(DetectorNotFound, match=r"no dataset 'rawe'; it has data"), \
            source(path, dataset="rawe"):
        pass


def test_no_images_at_all(tmp_path):
    path = tmp_path / "empty.h5"
    with h5py.File(path, "w") as file:
        file["pulse"] = np.arange(5)
    with pytest.raises(DetectorNotFound, match="no stack of images"), source(path):
        pass


def test_files_that_do_not_exist(tmp_path):
    with pytest.raises(RunNotFound, match="does not exist"), source(tmp_path / "no.h5"):
        pass
    with pytest.raises(RunNotFound, match="matches no file"), source(tmp_path / "*.cxi"):
        pass
    with pytest.raises(ConfigurationError, match="no files"):
        source()


def test_assembled_images_need_a_pixel_size(tmp_path):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(2, panels=1)[:, 0])
    with source(path, detector="assembled") as opened, \
            pytest.raises(GeometryError, match="pixel_size_m"):
        opened.constants()


def test_unknown_panels_need_a_geometry(tmp_path):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(2))
    with source(path) as opened, pytest.raises(GeometryError, match="--geometry"):
        opened.constants()


def test_raw_jungfrau_words_need_constants(tmp_path):
    frames = np.full((1, 1, 512, 1024), 2900, np.uint16)
    path = mock.write_stack(tmp_path / "run.h5", frames)
    with source(path) as opened:
        assert opened.run.raw_dtype == "uint16"
        with pytest.raises(ConstantsError, match="--constants"):
            opened.constants()
    constants = tmp_path / "constants.h5"
    with h5py.File(constants, "w") as file:
        for name, value in (("pedestals", 2900), ("pixel_gain", 40), ("pixel_status", 0)):
            file[f"jungfrau/{name}"] = np.full((3, 1, 512, 1024), value, "f4")
    with source(path, constants=str(constants)) as opened:
        assert not opened.constants().calibrated
        assert read(opened)[0].dtype == np.uint16


def test_distance_and_energy_stated_by_the_user_win(tmp_path, geometry):
    path = mock.write_cxi(tmp_path / "x.cxi", mock.frames(2))
    with source(path, geometry=str(geometry), panel_shape=(2, 8, 16), distance_m=0.25,
                photon_energy_eV=8000.0) as opened:
        frame = next(iter(opened.frames(whole(opened))))
        assert frame.scalars["photon_energy_eV"] == 8000.0
        assert frame.scalars["distance_m"] == 0.25
        assert opened.constants().geometry.distance_m == 0.25


def test_implausible_energies_are_missing(tmp_path, geometry):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(4))
    with h5py.File(path, "r+") as file:
        file["photon_energy_eV"] = [np.nan, np.inf, 0.0, 9500.0]
    with source(path, geometry=str(geometry)) as opened:
        energies = [f.scalars.get("photon_energy_eV") for f in opened.frames(whole(opened))]
        assert energies == [None, None, None, 9500.0]
        assert any("photon energy" in note for note in opened.run.notes)


def test_first_events_only(tmp_path, geometry):
    path = mock.write_stack(tmp_path / "run.h5", mock.frames(6))
    with source(path, geometry=str(geometry), max_events=2) as opened:
        assert opened.expected_events() == 2
        assert sorted(read(opened)) == [0, 1]


def test_importing_the_source_starts_nothing():
    code = ("import sys, xfel_classify.sources.hdf5, xfel_classify.sources.psana2; "
            "print([m for m in ('psana', 'mpi4py', 'torch', 'fabio', 'scipy') "
            "if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_summary_is_complete_for_a_frame_of_another_shape(tmp_path, geometry):
    first = mock.write_stack(tmp_path / "a.h5", mock.frames(2))
    other = mock.write_stack(tmp_path / "b.h5", np.ones((2, 2, 8, 20), "f4"))
    with source(first, other, geometry=str(geometry)) as opened:
        statuses = [s for _, s, *_ in summary(opened.frames(whole(opened))).values()]
        assert statuses == [EventStatus.OK] * 2 + [EventStatus.WRONG_SHAPE] * 2
        assert any("b.h5" in note for note in opened.run.notes)
