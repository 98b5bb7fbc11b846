"""Methods side by side: what each holds, counted on real tensors; which devices they fit."""

import pytest
import torch

from crispedit.assumed import Method, choose, falling
from crispedit.errors import ConfigError
from crispedit.methods import METHODS, compare_methods, parse_devices
from crispedit.natural import NaturalDescent
from crispedit.planning import plan_edit
from crispedit.priced import priced_rule
from crispedit.rule_choice import step_flops
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from test_planning import GB, SETTINGS, WORK

WIDE, NARROW = (128, 1024), (48, 96)


def subspace(shape, form, energy=0.8):
    spectrum = Spectrum.of(*(torch.diag(falling(n, 1.0)) for n in shape[::-1]))
    return Subspace.of(spectrum, energy, form)


def tensors_of(thing) -> list[torch.Tensor]:
    return [value for value in vars(thing).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("shape", "constraint", "form"), [(WIDE, "cross", "cross"), (NARROW, "staircase", "pivot")])
def test_prices_hold_what_is_planned(shape, constraint, form):
    """A metric; and, in leading bases, these, with W as it was."""
    found = choose(shape, "dense", 0.8, None, Method(constraint=constraint, update="priced"))
    rule = priced_rule(subspace(shape, form), 0.0, damping=1e-4)
    held = rule.metric.nbytes
    if rule.__class__.__name__ == "PricedLeading":
        held += 4 * shape[0] * shape[1]  # W as it was
        held += sum(t.nbytes for basis in (rule.frame.inputs, rule.frame.outputs) for t in tensors_of(basis))
    assert found.rule_bytes + found.frame_bytes == held
    assert found.step_flops(7) == step_flops("priced", subspace(shape, form), 7)


def test_a_budget_keeps_one_momentum():
    """Where Adam has two moments; the originals that drift is measured from take the place of the other."""
    parameter = torch.zeros(NARROW)
    descent = NaturalDescent([parameter], [torch.ones(NARROW)], 0.1, 3)
    assert sum(mean.nbytes for mean in descent.means) == parameter.nbytes


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_planned_as_it_is_compared(name):
    kind, method = METHODS[name]
    tried = SETTINGS.__class__(**{**vars(SETTINGS), "kind": kind, "method": method})
    (found,) = (one for one in compare_methods(WORK, SETTINGS, {"1TB": 1000 * GB}) if one.name == name)
    assert found.stages == plan_edit(WORK, tried, 1000 * GB).stages


def test_what_fits_is_what_takes_no_more():
    found = compare_methods(WORK, SETTINGS, {"8GB": 8 * GB, "1TB": 1000 * GB})
    assert [one.name for one in found] == list(METHODS)
    assert all(one.fits["1TB"] for one in found)
    assert all(one.fits["8GB"] == (one.peak.num_bytes <= 8 * GB) for one in found)


def test_methods_differ_as_they_should():
    """Eq. 6 multiplies the most; a pivot less, and it holds no mask; sketches are the smallest."""
    by_name = {one.name: {s.name: s for s in one.stages} for one in compare_methods(WORK, SETTINGS, {"1TB": 1000 * GB})}
    flops = {name: stages["edit"].flops for name, stages in by_name.items()}
    assert flops["cross"] < flops["pivot"] < flops["coordinates"] < flops["dense"]
    held = {name: stages["edit"].num_bytes for name, stages in by_name.items()}
    assert held["dense"] - held["pivot"] == 4 * 3 * 2048 * 8192
    curvature = {name: stages["curvature"].num_bytes for name, stages in by_name.items()}
    assert min(curvature, key=lambda name: curvature[name]) == "sketch"
    assert flops["budget"] > flops["priced"]


def test_a_known_curvature_leaves_methods_of_other_factors_out():
    known = WORK.__class__(**{f: v for f, v in vars(WORK).items() if f != "_sizes"} | {"known": True, "halves": []})
    assert "sketch" not in [one.name for one in compare_methods(known, SETTINGS, {"1TB": 1000 * GB})]


def test_sizes_of_devices_are_read():
    assert parse_devices("80GB, 24GB") == {"24GB": 24 * GB, "80GB": 80 * GB}
    for text in ("", ",", "24", "24GB,many"):
        with pytest.raises(ConfigError):
            parse_devices(text)


def test_sketches_know_no_staircase():
    with pytest.raises(ConfigError, match="use constraint cross"):
        choose(WIDE, "sketch", 0.8, None, Method(constraint="staircase"))
