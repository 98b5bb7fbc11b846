"""AlphaEdit: the null space, the closed form in it, and rounds. What it shares with MEMIT is tested there."""

import pytest
import torch

from crispedit.editors._locate import closed_form
from crispedit.editors.alphaedit import Config, NullSpace
from crispedit.editors.alphaedit import edit as alphaedit
from crispedit.errors import ConfigError
from crispedit.factors import Factors
from crispedit.models import frozen
from crispedit.moments import Sketch
from crispedit.precision import float32_masters
from families import tiny_model
from reference import random_factor, relative
from test_memit import CPU, EDITS, moment, problem_for, prompter_for, random, run

SPECTRUM = torch.cat([torch.tensor([50.0, 20.0, 5.0, 1.0]), torch.full((20,), 0.01)])


def subspace_of(A, config, d_out=10, sketch=False):
    from builders import curvature_of

    A = Sketch.of(A.float(), rank=8) if sketch else A.float()
    G = Sketch.of(torch.eye(d_out), rank=5) if sketch else torch.eye(d_out)
    return config.subspace(curvature_of({"W": Factors(A=A, G=G, num_tokens=9)}), "W")


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"energy": 0.5}, 1),  # 50 of 76.2
        ({"energy": 0.9}, 2),  # 70
        ({"energy": 0.95}, 3),
        ({"threshold": 2e-2}, 4),
        ({"threshold": 10.0, "energy": 0.99}, 2),
        ({"threshold": 100.0}, 0),
    ],
)
def test_the_null_space_is_off_the_leading_eigenvectors(settings, left_out):
    A = random_factor(SPECTRUM, seed=0)
    subspace = subspace_of(A, Config(**settings))
    assert subspace.threshold.cross == (0, left_out)
    vectors = torch.linalg.eigh(A).eigenvectors.flip(1)[:, left_out:]
    projector = vectors @ vectors.T
    keys = random(24, 7, seed=1)
    space = NullSpace(subspace, 10.0, CPU)
    assert relative(space.times(keys), projector @ keys) < 1e-5
    assert space.details()["null_dimension"] == 24 - left_out
    change = random(10, 24, seed=2).float()
    assert relative(subspace.project(change), change.double() @ projector) < 1e-5


def test_a_threshold_that_leaves_nothing_is_named():
    with pytest.raises(ConfigError, match="every direction of the inputs is left out"):
        subspace_of(random_factor(SPECTRUM, seed=0), Config(threshold=1e-3))


def test_a_sketch_knows_the_leading_directions_or_says_that_it_does_not():
    A = random_factor(SPECTRUM, seed=0)
    exact, found = (subspace_of(A, Config(energy=0.9), sketch=sketch) for sketch in (False, True))
    change = random(10, 24, seed=2).float()
    # the tail is 0.01 beside 20: a sketch of rank 8 is that far off the eigenvectors
    assert relative(found.project(change), exact.project(change)) < 1e-2
    with pytest.raises(ConfigError, match="known, by a sketch"):
        subspace_of(A, Config(energy=0.9999), sketch=True)


@pytest.mark.parametrize("earlier", [0, 5])
def test_the_closed_form_is_the_published_one(earlier):
    """Eq. 14 of the paper by LU, as its code has it: [P (K Kᵀ + Q) + L2 I] X = P K Rᵀ."""
    A = random_factor(SPECTRUM, seed=0)
    vectors = torch.linalg.eigh(A).eigenvectors[:, :22]
    P = vectors @ vectors.T
    K, R, K_p = random(24, 7, seed=2), random(10, 7, seed=3), random(24, earlier, seed=4)
    expected = torch.linalg.solve(P @ (K @ K.T + K_p @ K_p.T) + 10 * torch.eye(24), P @ K @ R.T).T
    found = closed_form(K, R, NullSpace(subspace_of(A, Config(energy=0.9)), 10.0, CPU), K_p)
    assert relative(found, expected) < 1e-5  # eigenvectors are kept in float32
    assert (found - found @ P).norm() < 1e-5 * found.norm()


def test_by_default_the_ridge_goes_with_the_keys():
    space = NullSpace(subspace_of(random_factor(SPECTRUM, seed=0), Config()), "auto", CPU)
    keys = random(24, 7, seed=2)
    assert space.ridge(3 * keys) == pytest.approx(9 * space.ridge(keys))
    one, three = (closed_form(scale * keys, random(10, 7, seed=3), space) for scale in (1, 3))
    assert relative(3 * three, one) < 1e-10  # activations in other units are another W and nothing else


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_changes_lie_in_the_null_space_over_all_rounds(family):
    model, prompter = tiny_model(family), prompter_for()
    problem = problem_for(model, prompter)
    config = Config(contexts=0, steps=6, round_size=2)
    before = {m.name: m.weight.clone() for m in problem.matrices}
    rounds = run(problem, config, alphaedit)
    assert [r.num_edits for r in rounds] == [2, 4]
    for matrix in problem.matrices:
        subspace = config.subspace(problem.curvature, matrix.name)
        change = matrix.weight - before[matrix.name]
        assert change.norm() > 0
        assert subspace.share_outside(change) < 1e-4  # W₀ + ΔW is rounded in float32
        details = rounds[0].details["matrices"][matrix.name]
        assert 0 < details["null_dimension"] < matrix.shape[1]


def test_later_rounds_keep_what_earlier_keys_give():
    """With ‖P k‖² far above L2, and more inputs than keys, what was written stays written."""
    from crispedit.editors._locate import subject_keys
    from crispedit.editors._subjects import asked

    model, prompter = tiny_model("llama"), prompter_for()
    problem = problem_for(model, prompter, layers=(2,))
    before = problem.matrices[0].weight.clone()
    after = []
    with frozen(model), float32_masters(problem.matrices):
        for _ in alphaedit(problem, Config(contexts=0, steps=6, round_size=2, l2=1e-6, energy=0.5)):
            after.append(problem.matrices[0].weight - before)
        keys = subject_keys(model, problem.matrices[0], asked(model, prompter, EDITS[:2], ("",)))
    assert relative(after[1] @ keys.T, after[0] @ keys.T) < 1e-2


def test_sketched_factors_edit_too():
    model, prompter = tiny_model("llama"), prompter_for()
    dense = problem_for(model, prompter).curvature.factors
    moments = {
        name: Factors(A=Sketch.of(moment(len(f.A), 100)), G=Sketch.of(f.G), num_tokens=9) for name, f in dense.items()
    }
    problem = problem_for(model, prompter, moments=moments)
    rounds = run(problem, Config(contexts=0, steps=4, energy=0.2), alphaedit)
    assert rounds[0].details["value_missed"] < 1
