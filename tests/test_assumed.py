"""What `auto` will take, on assumed spectra: against what it does take where the spectra are those."""

import pytest
import torch

from crispedit.assumed import choose, exponent, falling
from crispedit.rule_choice import chosen_update
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.updates import LeadingCoordinates


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.9])
def test_a_wide_matrix_gets_what_a_search_finds(energy):
    """The cross, the rule and its bases of real factors with such spectra; about as many vectors."""
    shape = (1100, 2304)
    A, G = (torch.diag(falling(n, 1.0)) for n in shape[::-1])
    spectrum = Spectrum.for_cross(A, G, energy)
    found, real = choose(shape, "dense", energy), Subspace.of(spectrum, energy, "cross")
    assert found.subspace.threshold.cross == real.threshold.cross
    assert found.update == chosen_update(real)
    assert found.subspace.spectrum.complete == spectrum.complete
    held = 4 * sum(n * k for n, k in zip(shape[::-1], spectrum.num_vectors, strict=True))
    assert 1 / 1.3 < found.spectrum_bytes / held < 1.3


def test_a_rule_s_bytes_are_those_that_it_holds():
    """Leading coordinates: both bases, and W as it was."""
    found = choose((128, 1024), "dense", 0.8)
    assert found.update == "leading"
    spectrum = Spectrum.of(*(torch.diag(falling(n, 1.0)) for n in (1024, 128)))
    frame = LeadingCoordinates(Subspace.of(spectrum, 0.8, "cross")).frame
    held = [*vars(frame.inputs).values(), *vars(frame.outputs).values()]
    assert (found.rule_bytes, found.frame_bytes) == (4 * 128 * 1024, sum(tensor.nbytes for tensor in held))
    assert found.step_flops(7) == 7 * frame.flops


def test_a_narrow_matrix_is_diagonalised_whole():
    found = choose((256, 576), "dense", 0.9)
    assert (found.update, found.flops, found.cubes) == ("coordinates", 0, 256**3 + 576**3)
    assert found.spectrum_bytes == 4 * (256**2 + 576**2) + 16 * (256 + 576)
    assert found.rule_bytes == 4 * 256 * 576  # the mask
    assert found.step_flops(7) == found.step_flops(700) == 4 * 256 * 576 * (256 + 576)


def test_of_sketches_no_more_is_taken_than_they_know():
    found = choose((1024, 2816), "sketch", 0.99)
    r, c = found.subspace.threshold.cross
    assert (r <= 512, c <= 1408, found.subspace.spectrum.num_vectors) == (True, True, (1408, 512))


@pytest.mark.parametrize("p", [0.3, 1.0, 1.7])
def test_an_exponent_is_found_from_an_effective_rank(p):
    assert exponent(500, 1 / float(falling(500, p).square().sum())) == pytest.approx(p, rel=1e-6)


def test_what_is_known_of_a_curvature_counts():
    """Flat spectra need many more directions than steep ones."""
    flat, steep = (choose((1100, 2304), "dense", 0.5, ranks) for ranks in ((1500.0, 800.0), (3.0, 3.0)))
    assert flat.cubes > 10 * steep.cubes
    assert flat.subspace.spectrum.num_vectors[0] > steep.subspace.spectrum.num_vectors[0]
