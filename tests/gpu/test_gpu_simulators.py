"""Simulators on a real GPU: what the processor computes, to rounding.  Not yet run on one."""
import numpy as np
import pytest

from xfel_classify.simulate.conditions import draw_conditions
from xfel_classify.simulate.sfx import SimulatedRun
from xfel_classify.simulate.sfx_torch import RunOnDevice
from xfel_classify.simulate.spi_conditions import draw_spi
from xfel_classify.simulate.spi_images import spi_image
from xfel_classify.simulate.stills_512 import draw_still, expected_quadrant
from xfel_classify.simulate.stills_torch import expected_quadrants, simulate_quadrants

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def torch_sees_the_device():
    if not torch.cuda.is_available():
        pytest.skip("torch is a CPU build")


@pytest.mark.parametrize("preset", ["resolution", "gaussian_f12", "uniform_panels"])
def test_stills_have_the_expected_images_and_labels_of_the_processor(preset):
    drawn = [draw_still(41, run, event, preset) for run in range(4) for event in range(4)]
    for (expected, good, seen), c in zip(expected_quadrants(drawn, "cuda"), drawn, strict=True):
        reference, good_reference, seen_reference = expected_quadrant(c)
        np.testing.assert_allclose(expected, reference, rtol=2e-6, atol=3e-6)
        np.testing.assert_array_equal(good, good_reference)
        assert seen == seen_reference


def test_noise_of_stills_is_that_of_a_seed_and_follows_the_law():
    drawn = [draw_still(42, run, 0, "uniform_f1") for run in range(6)]
    together = list(simulate_quadrants(drawn, "cuda", batch=6))
    alone = list(simulate_quadrants(drawn, "cuda", batch=1))
    on_cpu = list(simulate_quadrants(drawn, "cpu-torch"))
    for one, again, other in zip(together, alone, on_cpu, strict=True):
        # additions where spots overlap may round differently: a photon here and there
        assert np.mean(one.photons_SF != again.photons_SF) < 1e-4
        np.testing.assert_array_equal(one.good_SF, other.good_SF)
        a, b = (np.clip(still.photons_SF[still.good_SF], -5, 100) for still in (one, other))
        assert abs(a.mean() - b.mean()) < 6 * b.std() / np.sqrt(len(b) / 2)
        assert a.std() == pytest.approx(b.std(), rel=0.03)


def test_particles_are_those_of_the_compiled_code():
    for event in range(4):
        c = draw_spi(43, 0, event, "paper:particles=2cex+1igy")
        one, other = spi_image(c), spi_image(c, device="cuda")
        np.testing.assert_allclose(other.expected_HW, one.expected_HW,
                                   atol=1e-4 * one.expected_HW.max())


@pytest.mark.parametrize("preset", ["training", "shifted_full"])
def test_runs_have_the_truth_and_the_light_of_the_processor(preset):
    run = SimulatedRun(draw_conditions(44, 1, preset, hit_fraction=0.6))
    numbers = range(8)
    on_gpu, truths = RunOnDevice(run, "cuda").expected(numbers)
    on_cpu, _ = RunOnDevice(run, "cpu-torch").expected(numbers)
    np.testing.assert_allclose(on_gpu.cpu().numpy(), on_cpu.numpy(), rtol=2e-6, atol=3e-6)
    for number, truth in zip(numbers, truths, strict=True):
        _, reference = run.event(number)
        for name in truth.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(truth, name), getattr(reference, name))
