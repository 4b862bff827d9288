"""Images and sets of single particles: reproducible, labelled as they are, believable noise."""
import dataclasses

import h5py
import numpy as np
import pytest

from xfel_classify.core import ConfigurationError, OutputExists
from xfel_classify.simulate.spi_conditions import (
    SPI_BODIES,
    SPI_PARTICLES,
    SPI_PRESETS,
    SPI_UNSEEN,
    draw_spi,
    spi_preset,
)
from xfel_classify.simulate.spi_detector import add_surroundings, detect, good_pixels
from xfel_classify.simulate.spi_images import (
    SPI_LABELS,
    copies_of,
    simulate_spi,
    spi_image,
    spi_labels,
)
from xfel_classify.simulate.spi_sets import write_spi_set

SMALL = "particles=2cex+1igy"       # transforms that are made fast
PAPER = f"paper:{SMALL}"


# --- what is drawn --------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", sorted(SPI_PRESETS))
def test_every_preset_can_be_drawn(preset):
    drawn = [draw_spi(1, 0, event, preset) for event in range(30)]
    assert drawn == [draw_spi(1, 0, event, preset) for event in range(30)]
    assert drawn != [draw_spi(2, 0, event, preset) for event in range(30)]
    names = {c.particle for c in drawn}
    if spi_preset(preset).bodies:
        assert names <= set(SPI_BODIES)
        assert {c.kind for c in drawn} <= {"good", "bad", "contaminant", "blank"}
    else:
        assert names <= set(SPI_UNSEEN if preset.endswith("_unseen") else SPI_PARTICLES)
        assert all((c.particle_index == -1) == preset.endswith("_unseen") for c in drawn)


def test_shares_of_the_paper_are_exact():
    """4000 / 1000 / 1000 / 1000 of every particle in 77,000: 4 / 1 / 1 / 1 in every 77."""
    drawn = [draw_spi(3, 8, event, "paper") for event in range(154)]
    table = np.zeros((11, 4), int)
    for c in drawn:
        table[c.particle_index, c.count - 1] += 1
    assert (table == [8, 2, 2, 2]).all()
    assert drawn[0].stand_in == {"1fpv": "1rb8"}.get(drawn[0].particle, drawn[0].stand_in)
    assert {(c.fluence, c.distance_m, c.photon_energy_eV) for c in drawn} == {(1, 0.2905, 4600)}
    assert drawn[:10] != [draw_spi(3, 9, event, "paper") for event in range(10)]


def test_what_a_preset_says_is_what_is_drawn():
    jitter = np.log([draw_spi(1, 0, event, "jitter").fluence for event in range(2000)])
    assert jitter.std() == pytest.approx(0.5, abs=0.03) and abs(jitter.mean()) < 0.05
    assert draw_spi(1, 0, 0, "faint").fluence == pytest.approx(0.1)
    focus = np.array([draw_spi(1, 0, event, "paper:focus=true").fluence for event in range(500)])
    assert focus.min() >= 0.01 and focus.max() <= 1 and 0.05 < np.median(focus) < 0.2
    kinds = [draw_spi(1, 0, event, "quality").kind for event in range(2000)]
    assert np.mean([kind == "good" for kind in kinds]) == pytest.approx(0.5, abs=0.04)
    few = [draw_spi(1, 0, event, "quality_experiment").kind for event in range(2000)]
    assert np.mean([kind == "good" for kind in few]) == pytest.approx(0.06, abs=0.02)
    runs = [draw_spi(1, run, 0, "realistic") for run in range(50)]
    assert {10 <= c.gap_px <= 20 for c in runs} == {True} and len({c.gap_px for c in runs}) > 4
    far = [draw_spi(1, 0, event, "distance").distance_m for event in range(100)]
    assert 0.24 <= min(far) < 0.26 and 0.37 < max(far) <= 0.40


def test_switches_change_a_preset():
    c = draw_spi(1, 0, 0, "realistic:half_chance=0,gap_px=16,counts=1+1,particles=1ss8,center=0")
    assert (c.half, c.gap_px, c.particle, c.center) == ("", 16, "1ss8", False)
    assert spi_preset("paper:separation=1..1.5").separation == (1.0, 1.5)
    for wrong, message in (("papr", "papr"), ("paper:gap", "gap"), ("paper:gaps=1", "gaps"),
                           ("paper:gap_px=wide", "number"), ("paper:center=maybe", "number")):
        with pytest.raises(ConfigurationError, match=message):
            draw_spi(1, 0, 0, wrong)


# --- pixels ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", [
    PAPER, f"jitter:{SMALL}", f"realistic:{SMALL}", f"faint:{SMALL}", f"paper_unseen:{SMALL}",
    "quality_shapes:particles=sphere+dodecahedron", "quality_experiment:particles=sphere",
    "pr772:particles=sphere"])
def test_images_and_labels_of_every_kind_of_preset(preset):
    seen = set()
    for event in range(12):
        c = draw_spi(4, event % 3, event, preset)
        image, labels = simulate_spi(c), spi_labels(c)
        assert image.dtype == np.float32 and image.shape == c.shape == spi_preset(preset).shape
        assert np.isfinite(image).all()
        assert tuple(labels) == SPI_LABELS
        assert labels["quality"] == (c.count == 1 and c.kind != "contaminant")
        assert labels["diameter_A"] == c.diameter_A and labels["distance_m"] == c.distance_m
        assert (labels["photons"] > 0) == (c.kind != "blank")
        assert -1 <= labels["count"] <= 4
        seen.add(labels["count"])
        made = spi_image(c)
        assert not image[~made.good_HW].any()
        if c.count:
            assert image.sum() > 0
    assert len(seen) > 1


def test_an_image_does_not_depend_on_what_was_made_before():
    c = draw_spi(5, 2, 7, f"realistic:{SMALL}")
    first = simulate_spi(c)
    for event in range(4):
        simulate_spi(draw_spi(5, 1, event, f"realistic:{SMALL}"))
    np.testing.assert_array_equal(simulate_spi(draw_spi(5, 2, 7, f"realistic:{SMALL}")), first)
    first[:] = -1           # what is handed out is the caller's own
    assert simulate_spi(c).max() > 0


def test_without_faults_values_are_photons_over_64():
    image = simulate_spi(draw_spi(1, 0, 3, PAPER))
    assert np.array_equal(image * 64, np.round(image * 64)) and image.min() == 0


def test_noise_is_poisson_and_photons_are_proportional_to_the_count():
    totals = {n: [] for n in (1, 2, 3, 4)}
    pulls = []
    for event in range(28):
        c = draw_spi(6, 0, event, PAPER)
        made = spi_image(c)
        expected = made.expected_HW.astype(float) * 64
        counted = made.image_HW.astype(float) * 64
        bright = expected > 5
        pulls.append((counted - expected)[bright] / np.sqrt(expected[bright]))
        if c.particle == "2cex":
            totals[c.count].append(made.photons)
        assert made.photons == pytest.approx(expected.sum(), rel=1e-5)
    pulls = np.concatenate(pulls)
    assert abs(pulls.mean()) < 0.02 and pulls.std() == pytest.approx(1, abs=0.02)
    per_copy = [np.mean(values) / n for n, values in totals.items()]
    np.testing.assert_allclose(per_copy, np.mean(per_copy), rtol=0.2)


@pytest.mark.parametrize("particle, least, most",
                         [("1ss8", 0.5e6, 0.65e6), ("6xs6", 0.17e6, 0.24e6)])
def test_photons_per_image_are_those_that_were_published(particle, least, most):
    """Methods 7.1: GroEL 0.56 M, spike 0.20 M for a single particle at the paper's fluence."""
    preset = f"paper:particles={particle},counts=1"
    mean = np.mean([spi_labels(draw_spi(1, 0, event, preset))["photons"] for event in range(12)])
    assert least < mean < most


# --- nuisances ------------------------------------------------------------------------------------

def of(**changes):
    return dataclasses.replace(draw_spi(2, 0, 0, f"{PAPER},poisson=false"), **changes)


def test_gap_half_and_stop_are_zero_and_the_rest_is_not():
    expected = np.ones((128, 128), np.float32)
    for changes, dead in (
            ({"gap_px": 16.0}, np.s_[63:65]), ({"half": "left"}, np.s_[:, :64]),
            ({"half": "bottom"}, np.s_[64:]), ({"stop_px": 20.0}, np.s_[63:65, 63:65])):
        image = detect(of(**changes), expected)
        assert not image[dead].any()
        image[dead] = 1
        assert image.mean() > 0.99
    part = good_pixels(of(gap_px=12.0))     # a gap that cuts blocks leaves the mean alone
    assert not part[506:518].any() and part[505].all() and part[518].all()
    np.testing.assert_allclose(detect(of(gap_px=12.0), expected), 1.0)


def test_faults_belong_to_the_run_and_noise_to_the_event():
    faults = dict(hot_fraction=2e-4, dead_fraction=0.01, gain_noise=0.5)
    flat = np.full((128, 128), 3.0, np.float32)
    one, other = (detect(of(event=event, **faults), flat) for event in (1, 2))
    hot = one > 4
    assert hot.sum() > 50 and (hot & (other > 4)).sum() > 0.7 * hot.sum()
    assert (one == other).mean() > 0.98 and one[~hot].std() == pytest.approx(3 * 0.5 / 8, rel=0.1)
    noisy = detect(of(read_noise_photons=0.8), flat)
    assert (noisy - 3).std() == pytest.approx(0.1, rel=0.05)
    lines = detect(of(common_mode_photons=1.0), flat) - 3
    assert np.abs(lines[:, :16] - lines[:, :1]).max() < 1e-6 and lines.std() > 0.2
    assert detect(of(saturation_photons=2.0), flat).max() == 2.0


def test_surroundings():
    flat = np.full((128, 128), 2.0, np.float32)
    assert np.array_equal(add_surroundings(of(), flat), flat)
    more = add_surroundings(of(background=0.5, background_radial=1.0), flat) - 2
    assert more.min() > 0.5 and more[64, 64] == pytest.approx(1.5, abs=0.05)
    tilted = add_surroundings(of(background=1.0, background_slope=(0.5, 0.0)), flat)
    assert tilted[0, -1] > 1.3 + tilted[0, 0] - 0.6
    fields = [add_surroundings(of(event=event, fluctuation_sigma=0.3, fluctuation_px=20.0), flat)
              for event in range(20)]
    assert np.std(fields) / 2 == pytest.approx(0.3, abs=0.05)
    near = np.corrcoef([f[64, 60] for f in fields], [f[64, 63] for f in fields])[0, 1]
    assert near > 0.9
    rings = np.broadcast_to(1 + np.cos(np.arange(128) / 3), (128, 128)).astype(np.float32)
    assert add_surroundings(of(contrast=0.5), rings).std() < 0.9 * rings.std()


def test_incoherent_stretched_mixed_and_off_centre():
    preset = f"{PAPER},counts=0+1"
    c = draw_spi(1, 0, 0, preset)
    touching, apart = (copies_of(dataclasses.replace(c, separation=s)) for s in (1.0, 1.5))
    assert np.linalg.norm(touching[1].position_3) == pytest.approx(c.diameter_A, rel=1e-4)
    assert np.linalg.norm(apart[1].position_3) == pytest.approx(1.5 * c.diameter_A, rel=1e-4)
    fringes = spi_image(c).expected_HW
    none = spi_image(dataclasses.replace(c, coherence_A=0.0)).expected_HW
    assert np.abs(fringes - none).max() > 0.1 * none.max()
    mixed = [draw_spi(1, 0, event, f"{preset},mixed_chance=1") for event in range(4)]
    for one in mixed:
        first, second = copies_of(one)
        assert not np.array_equal(first.volume_XYZ[0], second.volume_XYZ[0])
        assert spi_labels(one)["particle"] == -1
    off = copies_of(dataclasses.replace(c, center=False))
    assert np.linalg.norm(off[0].position_3) > 1      # turned about the origin of the file


def test_a_finer_mesh_damps_less():
    """The lookup of a complex mesh loses photons, more of them the larger the particle."""
    c = dataclasses.replace(draw_spi(1, 0, 0, "paper:particles=1igy,counts=1"), shape=(32, 32),
                            first_px=(-128.0, -128.0))
    coarse, fine = (spi_image(dataclasses.replace(c, finer=finer)).photons for finer in (1, 2))
    assert 1.002 < fine / coarse < 1.05


# --- sets -----------------------------------------------------------------------------------------

def test_a_set_is_the_same_for_any_number_of_workers(tmp_path):
    seen = []
    one = write_spi_set(tmp_path / "one.h5", PAPER, 11, 33, progress=seen.append)
    import xfel_classify.simulate.spi_sets as sets

    two = write_spi_set(tmp_path / "two.h5", PAPER, 11, 90, processes=2)
    assert seen == [33] and sets.CHUNK == 77
    with h5py.File(one) as a, h5py.File(two) as b:
        assert a["images"].shape == (33, 128, 128) and a["images"].chunks == (1, 128, 128)
        np.testing.assert_array_equal(a["images"][:], b["images"][:33])
        np.testing.assert_array_equal(a["labels"][:], b["labels"][:33])
        assert tuple(a["labels"].attrs["names"]) == SPI_LABELS
        assert a["geom"].attrs["names"][0] == "wavelength_A"
        assert a.attrs["preset"] == PAPER and a.attrs["stand_ins"] == "none"
        assert a["classes"].asstr()[:].tolist() == list(SPI_PARTICLES)
        c = draw_spi(11, 1, 3, PAPER)       # row 17 of 14 events per run
        np.testing.assert_array_equal(a["images"][17], simulate_spi(c))
        assert a["meta/particle"].asstr()[17] == c.particle
    again = write_spi_set(tmp_path / "again.h5", PAPER, 11, 90)
    assert again.read_bytes() == two.read_bytes()
    with pytest.raises(OutputExists):
        write_spi_set(one, PAPER, 11, 3)
    with pytest.raises(ConfigurationError):
        write_spi_set(tmp_path / "none.h5", PAPER, 11, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.h5", "one.h5", "two.h5"]


def test_a_set_says_what_was_a_stand_in(tmp_path):
    path = write_spi_set(tmp_path / "s.h5", "paper:particles=6xs6,counts=1", 1, 1)
    with h5py.File(path) as file:
        assert file.attrs["stand_ins"] == "6xs6: spike_closed"
        assert file["meta/source"].asstr()[0] == "spike_closed"
        assert file["labels"][0, 1] == 7


def test_the_command_writes_a_set(tmp_path, capsys):
    from xfel_classify.cli import main

    assert main(["simulate", "spi", "--out", str(tmp_path), "--preset", PAPER, "--events", "2",
                 "--seed", "4"]) == 0
    (path,) = tmp_path.glob("*.h5")
    assert str(path) in capsys.readouterr().out and path.name.startswith("spi_paper_particles")
    assert main(["simulate", "spi", "--out", str(tmp_path), "--preset", "nice"]) != 0
