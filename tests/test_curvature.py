"""The curvature of a model: its file, its name by content, merging, the comparison of halves, sketches, kills."""

import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from builders import WordTokenizer, curvature_of, long_texts
from crispedit import description, eigen
from crispedit.curvature import Curvature
from crispedit.curvature_file import MANIFEST, TENSORS
from crispedit.description import ENERGY, describe
from crispedit.errors import ArtifactError, ConfigError, ModelError
from crispedit.estimation import estimate_factors
from crispedit.factors import Factors, merge_factors
from crispedit.merging import merge
from crispedit.models import edit_matrices, fingerprint, tokenizer_hash
from crispedit.moments import Sketch, captured
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.texts import CapabilityTexts, text_batches
from reference import random_factor, relative, tiny_llama

TEXTS = ["a bb ccc dddd", "the quick brown fox jumps", "one two three four five six", "so it goes", "no more of this"]


@pytest.fixture
def curvature() -> Curvature:
    return Curvature.estimate(tiny_llama(), WordTokenizer(), TEXTS, layers=[0, 1], seed=3, model_name="tiny")


def test_a_curvature_read_back_is_the_one_written(curvature, tmp_path):
    directory = curvature.save(tmp_path / "curvature")
    loaded = Curvature.load(directory)
    assert loaded.manifest() == curvature.manifest()
    assert loaded.path == curvature.path == directory
    assert loaded.layers == (0, 1)
    assert len(loaded.held_out) == 1
    assert loaded.num_tokens == sum(len(t.split()) - 1 for t in TEXTS if t not in loaded.held_out)
    for name, factors in curvature.factors.items():
        assert torch.equal(loaded.factors[name].A, factors.A)
        assert torch.equal(loaded.factors[name].G, factors.G)
        assert torch.equal(loaded.spectrum(name).alpha, curvature.spectrum(name).alpha)


def test_an_unknown_constraint_is_refused_with_the_nearest_name(curvature):
    with pytest.raises(ConfigError, match=r"constraint is 'crosss'.*did you mean 'cross'"):
        curvature.subspace(next(iter(curvature.factors)), 0.5, "crosss")


def test_a_spectrum_is_computed_once(curvature):
    (name, *_) = curvature.factors
    assert curvature.spectrum(name) is curvature.spectrum(name)


def test_an_unknown_fisher_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'empirical'"):
        Curvature.estimate(tiny_llama(), WordTokenizer(), TEXTS, fisher="empiric")


def edited_manifest(**changes):
    def damage(directory):
        path = directory / MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def without_key(key):
    def damage(directory):
        path = directory / MANIFEST
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return damage


DAMAGE = {
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "not a curvature directory"),
    "broken manifest": (lambda d: (d / MANIFEST).write_text('{"format": 1,'), "not JSON"),
    "another kind of manifest": (lambda d: (d / MANIFEST).write_text("[]"), "format None"),
    "another format": (edited_manifest(format=99), "has curvature format 99; this version reads 2"),
    "no format": (without_key("format"), "format None"),
    "no layers": (without_key("layers"), "damaged: 'layers'"),
    "layers that are no list": (edited_manifest(layers=None), "damaged"),
    "no factors": (lambda d: (d / TENSORS).unlink(), "damaged"),
    "half of the factors": (lambda d: (d / TENSORS).write_bytes((d / TENSORS).read_bytes()[:1000]), "damaged"),
    "factors of another matrix": (edited_manifest(matrices={"other.weight": {}}), "damaged: 'other.weight/A'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_directory_is_refused(curvature, tmp_path, kind):
    damage, message = DAMAGE[kind]
    directory = curvature.save(tmp_path / "curvature")
    damage(directory)
    with pytest.raises(ArtifactError, match=message):
        Curvature.load(directory)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere' is not a curvature directory"):
        Curvature.load(tmp_path / "nowhere")


def test_a_directory_in_use_is_not_overwritten_unless_told(curvature, tmp_path):
    curvature.save(tmp_path / "curvature")
    with pytest.raises(ArtifactError, match="not empty"):
        curvature.save(tmp_path / "curvature")
    curvature.save(tmp_path / "curvature", overwrite=True)


def test_the_manifest_says_what_the_factors_depend_on(curvature):
    manifest = curvature.manifest()
    assert manifest["format"] == 2
    assert manifest["dtype"] == "float32"
    assert manifest["factors"] == "dense"
    assert manifest["tokenizer"] == tokenizer_hash(WordTokenizer())
    assert manifest["texts"]["sha256"]
    assert manifest["chat_template"] is manifest["model_revision"] is None
    for of_matrix in manifest["matrices"].values():
        assert len(of_matrix["traces"]) == len(of_matrix["effective_rank"]) == 2
        assert 0 < of_matrix["share"] <= 1
        assert 0 <= of_matrix["overlap"] <= 1
    assert curvature.manifest(with_texts=False).keys() == manifest.keys() - {"held_out"}


def test_another_tokenizer_is_refused_and_another_chat_template_is_not(curvature):
    model = tiny_llama()
    matrices = edit_matrices(model, [0, 1])

    class Other(WordTokenizer):
        chat_template = "{{ messages }}"

        def get_vocab(self):
            return {"a": 1}

    class Template(WordTokenizer):
        chat_template = "{{ messages }}"

    Template.__name__ = "WordTokenizer"
    curvature.check_model(model, matrices, WordTokenizer())
    curvature.check_model(model, matrices, Template())
    with pytest.raises(ModelError, match=r"another tokenizer \(sha256 .*compute it with this one"):
        curvature.check_model(model, matrices, Other())


def test_the_revision_of_another_model_is_named(curvature):
    model = tiny_llama()
    matrices = edit_matrices(model, [0, 1])
    matrices[0].weight[0, 0] += 1
    model.config._commit_hash = "b" * 40
    with pytest.raises(ModelError, match=r"revision aaaaaaaaaaaa with other weights .* revision bbbbbbbbbbbb\)"):
        replace(curvature, model_revision="a" * 40).check_model(model, matrices)


def test_the_curvature_of_another_model_is_refused_with_both_fingerprints(curvature):
    model = tiny_llama()
    matrices = edit_matrices(model, [0, 1])
    curvature.check_model(model, matrices)
    matrices[0].weight[0, 0] += 1
    with pytest.raises(ModelError) as refusal:
        curvature.check_model(model, matrices)
    for part in ("'tiny'", curvature.model_fingerprint[:12], fingerprint(model)[:12]):
        assert part in str(refusal.value)


def test_a_layer_without_factors_is_refused(curvature):
    only_one = replace(curvature, factors=dict(list(curvature.factors.items())[:1]), layers=(0,))
    model = tiny_llama()
    with pytest.raises(ConfigError, match="no factors for layer 1; it has layers 0"):
        only_one.check_model(model, edit_matrices(model, [0, 1]))


# ---------------------------------------------------------------- halves, sketches, sums


def test_the_halves_of_the_texts_are_those_that_are_merged():
    """The halves' factors, computed by hand, give the curvature's; and the two numbers that compare them."""
    texts = CapabilityTexts(fit=tuple(TEXTS), held_out=("x y",), source="", seed=0, samples=None)
    model, tokenizer = tiny_llama(), WordTokenizer()
    found = Curvature.estimate(model, tokenizer, texts, layers=[1], fisher="empirical")
    (matrix,) = edit_matrices(model, [1])
    parts = [
        estimate_factors(model, [matrix], text_batches(model, tokenizer, half), fisher="empirical")[matrix.name]
        for half in (TEXTS[0::2], TEXTS[1::2])
    ]
    merged = merge_factors(parts)
    assert relative(found.factors[matrix.name].A, merged.A) < 1e-6
    assert relative(found.factors[matrix.name].G, merged.G) < 1e-6
    described = found.description[matrix.name]
    assert described == describe(merged, parts)
    crosses = [Subspace.of(Spectrum.of(f.A, f.G), ENERGY, "cross") for f in parts]
    assert described.energy == ENERGY
    held = []
    for cross, other in zip(crosses, parts[::-1], strict=True):
        P = [
            U[:, :k].double() @ U[:, :k].double().T
            for U, k in ((cross.spectrum.output_basis, cross.threshold.cross[0]),
                         (cross.spectrum.input_basis, cross.threshold.cross[1]))
        ]  # fmt: skip
        outside = [torch.trace(M.double() - p @ M.double() @ p) / M.double().trace()
                   for p, M in zip(P, (other.G, other.A), strict=True)]  # fmt: skip
        held.append(1 - float(outside[0] * outside[1]))
    assert described.transfer == pytest.approx(sum(held) / 2, abs=1e-5)


def test_equal_halves_overlap_whole_and_unrelated_ones_by_chance():
    one, other = (
        Factors(A=random_factor(power_law(60), seed), G=random_factor(power_law(40), seed + 1), num_tokens=9)
        for seed in (0, 2)
    )
    same = describe(one, [one, one])
    assert same.overlap == pytest.approx(1, abs=1e-5)
    assert same.transfer >= ENERGY - 1e-6
    chance = describe(one, [one, other])
    assert chance.overlap == pytest.approx(chance.share, abs=0.05)
    assert chance.transfer == pytest.approx(chance.share, abs=0.15)
    assert describe(one).overlap is None


@pytest.mark.parametrize(("p", "tried"), [(1.1, [8, 16, 32, 64]), (1.0, [8, 16, 32, 64, 128])])
def test_wide_factors_are_described_by_as_many_pairs_as_crosses_take(p, tried, monkeypatch):
    """Close to what diagonalisations say: a cross may be a little larger, for what follows its pairs is not known."""
    halves = [
        Factors(
            A=sampled_factor(power_law(400, p), 0, seed), G=sampled_factor(power_law(300, p), 1, seed), num_tokens=9
        )
        for seed in (5, 6)
    ]
    whole, ranks = describe(merge_factors(halves), halves), []
    monkeypatch.setattr(description, "DESCRIBED_WHOLE", 100)
    monkeypatch.setattr(description, "RANK", 8)
    leading = description.approximate_pairs
    monkeypatch.setattr(description, "approximate_pairs", lambda M, rank: (ranks.append(rank), leading(M, rank))[1])
    found = describe(merge_factors(halves), halves)
    assert ranks == [rank for rank in tried for _ in range(6)]
    assert found.traces == pytest.approx(whole.traces, rel=1e-6)
    assert found.effective_rank == pytest.approx(whole.effective_rank, rel=1e-5)
    assert found.energy == whole.energy
    assert whole.share <= found.share < 1.2 * whole.share
    assert found.overlap == pytest.approx(whole.overlap, abs=0.02)
    assert found.transfer == pytest.approx(whole.transfer, abs=0.02)


def sampled_factor(values: torch.Tensor, seed: int, sample: int) -> torch.Tensor:
    """The second moment of 900 vectors whose expected one has these eigenvalues."""
    root = torch.linalg.cholesky(random_factor(values, seed).double() + 1e-9 * torch.eye(len(values)))
    noise = torch.randn(len(values), 900, generator=torch.Generator().manual_seed(sample), dtype=torch.float64)
    return ((root @ noise) @ (root @ noise).T / 900).float()


def power_law(n: int, p: float = 1.0) -> torch.Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -p


def test_a_sketched_curvature_is_kept_and_serves_a_cross_only(tmp_path):
    sketched, dense = (
        Curvature.estimate(tiny_llama(), WordTokenizer(), long_texts(), layers=[0, 1], factors=kind)
        for kind in ("sketch", "dense")
    )
    assert (sketched.kind, dense.kind) == ("sketch", "dense")
    loaded = Curvature.load(sketched.save(tmp_path / "sketch"))
    assert loaded.manifest() == sketched.manifest()
    for name, factors in sketched.factors.items():
        assert torch.equal(loaded.factors[name].A.product, factors.A.product)
        assert loaded.factors[name].A.trace == factors.A.trace == pytest.approx(float(dense.factors[name].A.trace()))
        with pytest.raises(ConfigError, match="sketched factors know leading directions only"):
            sketched.subspace(name, 0.5, "staircase")
        cross = sketched.subspace(name, 0.5)
        X = cross.project(torch.randn(cross.shape))
        r, c = cross.threshold.cross
        truth = dense.factors[name]
        U_G, U_A = cross.spectrum.output_basis[:, :r], cross.spectrum.input_basis[:, :c]
        held = 1 - (1 - captured(truth.G, U_G) / truth.G.trace()) * (1 - captured(truth.A, U_A) / truth.A.trace())
        assert held >= 0.5 - 1e-5, "a sketch protects at least what it says"
        assert cross.share_outside(X) < 1e-5


def test_an_energy_that_a_sketch_does_not_hold_is_refused_and_described_at_a_lower_one():
    A, G = (Sketch.of(random_factor(power_law(n, 0.5), n).float()) for n in (200, 100))
    curvature = curvature_of({"w": Factors(A=A, G=G, num_tokens=9)})
    with pytest.raises(ConfigError, match=r"a cross at energy 0\.9 takes more than .* lower the energy"):
        curvature.subspace("w", 0.9)
    assert 0 < curvature.description["w"].energy < 0.9
    assert curvature.subspace("w", curvature.description["w"].energy).form == "cross"


def test_curvatures_add_by_tokens_or_by_weights(curvature):
    model, tokenizer = tiny_llama(), WordTokenizer()
    other = Curvature.estimate(model, tokenizer, ["w x yy zz", "a b", "k kk kkk kkkk"], layers=[0, 1], seed=3)
    merged = merge([curvature, other])
    assert merged.num_tokens == curvature.num_tokens + other.num_tokens
    assert merged.held_out == (*curvature.held_out, *other.held_out)
    assert merged.texts["source"] == "merged"
    assert [part["weight"] for part in merged.texts["parts"]] == [curvature.num_tokens, other.num_tokens]
    weighted = merge([curvature, other], weights=[3, 1])
    for name, of_matrix in merged.factors.items():
        n, m = curvature.num_tokens, other.num_tokens
        A, B = curvature.factors[name].A, other.factors[name].A
        assert relative(of_matrix.A, (n * A + m * B) / (n + m)) < 1e-6
        assert relative(weighted.factors[name].A, (3 * A + B) / 4) < 1e-6
        fresh = Spectrum.of(of_matrix.A, of_matrix.G)
        assert relative(merged.spectrum(name).alpha, fresh.alpha) < 1e-6
    assert merged.texts["sha256"] != weighted.texts["sha256"]
    alone = merge([curvature])
    assert all(relative(alone.factors[n].G, f.G) < 1e-6 for n, f in curvature.factors.items())


def test_what_does_not_go_together_is_not_added(curvature):
    with pytest.raises(ConfigError, match="no curvature to merge"):
        merge([])
    for weights in ([1], [1, -1], [0, 0], [1, float("inf")]):
        with pytest.raises(ConfigError, match="weights is"):
            merge([curvature, curvature], weights)
    for change in ({"model_fingerprint": "x" * 64}, {"tokenizer": "y" * 64}, {"fisher": "empirical"}, {"layers": (0,)}):
        with pytest.raises(ConfigError, match=f"different {next(iter(change))} do not add"):
            merge([curvature, replace(curvature, **change)])


def _rounds(count):
    """Capability texts, and rounds of edits."""
    factors = Factors(A=torch.eye(2), G=torch.eye(3), num_tokens=3000)
    found = [curvature_of({"w": factors}, texts={"source": "bundled", "sha256": "c", "seed": 0, "samples": 9})]
    for number in range(count):
        factors = Factors(A=torch.eye(2) * number, G=torch.eye(3), num_tokens=10 + number)
        texts = {"source": "edits", "sha256": f"{number:x}", "seed": number, "samples": 5}
        found.append(curvature_of({"w": factors}, texts=texts))
    return found


def test_a_sum_says_what_it_is_of_in_the_same_room_after_any_number_of_rounds():
    of_rounds = _rounds(1000)
    found, sizes = of_rounds[0], []
    for one in of_rounds[1:]:
        found = merge([found, one])
        sizes.append(len(json.dumps(found.texts)))
    assert max(sizes) <= sizes[1] + 10  # digits of the numbers
    texts, edits = found.texts["parts"]
    assert texts == {"weight": 3000, "source": "bundled", "sha256": "c", "seed": 0, "samples": 9}
    assert edits["weight"] == found.num_tokens - 3000 == sum(10 + number for number in range(1000))
    assert (edits["rounds"], edits["samples"]) == (1000, 5000)
    assert merge(of_rounds).texts == found.texts
    other = [*of_rounds[:500], of_rounds[501], of_rounds[500], *of_rounds[502:]]
    assert merge(other).texts["sha256"] != found.texts["sha256"]


def test_weights_of_a_sum_within_a_sum_are_multiplied():
    """The factors are what the flat list of weights says."""
    texts, one, two = _rounds(2)
    other = _rounds(0)[0]
    other.texts = {**other.texts, "sha256": "d"}
    found = merge([merge([texts, other], [1, 3]), merge([one, two])], [10, 1])
    shares = [(part["source"], part["weight"]) for part in found.texts["parts"]]
    assert shares == [("bundled", 2.5), ("bundled", 7.5), ("edits", 1)]
    assert [part["weight"] for part in merge([texts, other], [1, 3]).texts["parts"]] == [1, 3]
    by_hand = merge_factors([c.factors["w"] for c in (texts, other, one, two)], [2.5, 7.5, 10 / 21, 11 / 21])
    assert torch.allclose(found.factors["w"].A, by_hand.A, rtol=1e-6)  # float32


def test_a_merged_spectrum_sets_out_from_the_one_that_is_known(monkeypatch):
    """And its cross protects the energy of the sum for certain, with hardly more directions than a fresh one."""
    monkeypatch.setattr(eigen, "DENSE_SIZE", 0)
    monkeypatch.setattr(eigen, "DENSE_SHARE", 2.0)
    monkeypatch.setattr(eigen, "BLOCK", 8)
    noise = torch.Generator().manual_seed(4)
    A, G = random_factor(power_law(400, 1.5), 0).float(), random_factor(power_law(300, 1.5), 1).float()
    new = [torch.randn(500, len(M), generator=noise) @ torch.linalg.cholesky(M + 1e-7 * torch.eye(len(M))).T
           for M in (A, G)]  # fmt: skip
    first = curvature_of({"w": Factors(A=A, G=G, num_tokens=50_000)})
    more = curvature_of({"w": Factors(A=new[0].T @ new[0] / 500, G=new[1].T @ new[1] / 500, num_tokens=500)})
    known = first.subspace("w", 0.8, "cross").spectrum
    assert not known.complete
    merged = merge([more, first])
    starts = []
    real = Spectrum.updated

    def spy(self, *arguments):
        starts.append(self)
        return real(self, *arguments)

    monkeypatch.setattr(Spectrum, "updated", spy)
    monkeypatch.setattr(Spectrum, "for_cross", None)
    cross = merged.subspace("w", 0.8, "cross")
    assert starts == [known]
    (r, c), factors = cross.threshold.cross, merged.factors["w"]
    sides = ((factors.G, cross.spectrum.output_basis[:, :r]), (factors.A, cross.spectrum.input_basis[:, :c]))
    held = 1 - math.prod(1 - captured(M, U) / float(M.trace()) for M, U in sides)
    assert held == pytest.approx(cross.threshold.captured, abs=1e-5)
    assert held >= 0.8 - 1e-6
    fresh = Subspace.of(Spectrum.of(factors.A, factors.G), 0.8, "cross")
    assert cross.threshold.num_high <= 1.01 * fresh.threshold.num_high


def test_the_largest_energy_yet_widens_a_cross_and_a_smaller_one_does_not(monkeypatch):
    """A first cross that takes no pair of G leaves nothing to set out from on that side."""
    monkeypatch.setattr(eigen, "DENSE_SIZE", 0)
    monkeypatch.setattr(eigen, "DENSE_SHARE", 2.0)
    monkeypatch.setattr(eigen, "BLOCK", 8)
    spectrum = power_law(120)
    spectrum[0] = 1.2 * float(spectrum.sum())
    factors = Factors(A=random_factor(spectrum, 0).float(), G=random_factor(power_law(90), 1).float(), num_tokens=9)
    curvature = curvature_of({"w": factors})
    assert curvature.subspace("w", 0.5, "cross").threshold.cross == (0, 1)
    wide = curvature.subspace("w", 0.9, "cross")
    r, c = wide.threshold.cross
    assert r > 0
    expected = Subspace.of(Spectrum.of(factors.A, factors.G), 0.9, "cross")
    assert (r, c) == expected.threshold.cross
    assert curvature.subspace("w", 0.7, "cross").spectrum is wide.spectrum
    merged = merge([curvature, curvature])
    assert merged.subspace("w", 0.9, "cross").threshold.num_high <= 1.01 * expected.threshold.num_high
    nothing = curvature_of({"w": factors})
    assert nothing.subspace("w", 0.0, "cross").threshold.num_high == 0
    assert merge([nothing]).subspace("w", 0.9, "cross").threshold.captured >= 0.9 - 1e-6


def test_of_wide_matrices_auto_protects_a_cross_of_leading_eigenvectors(curvature, monkeypatch):
    """Wide is where coordinates cost too much: crispedit.rule_choice, by counting."""
    name = next(iter(curvature.factors))
    assert curvature.subspace(name, 0.5).form != "cross"
    monkeypatch.setattr("crispedit.rule_choice.TOKENS", 1)
    assert curvature.subspace(name, 0.5).form == "cross"
    assert curvature.subspace(name, 0.5, "staircase").form != "cross"


def test_predicted_drift_is_half_the_kronecker_quadratic_form():
    """½ vec(ΔW)ᵀ (G ⊗ A) vec(ΔW), rows of ΔW one after the other, in float64; of sketches never more than that."""
    generator = torch.Generator().manual_seed(3)
    factors, changes, expected = {}, {}, 0.0
    for number, (d_out, d_in) in enumerate(((6, 9), (5, 4))):
        A, G = (random_factor(torch.arange(1, n + 1).double() ** -1.5, number) for n in (d_in, d_out))
        change = torch.randn(d_out, d_in, generator=generator)
        factors[f"w{number}"], changes[f"w{number}"] = Factors(A=A.float(), G=G.float(), num_tokens=7), change
        vector = change.double().flatten()
        expected += 0.5 * float(vector @ torch.kron(G.double(), A.double()) @ vector)
    assert curvature_of(factors).predicted_drift(changes) == pytest.approx(expected, rel=1e-5)  # float32 factors
    sketched = {
        name: Factors(A=Sketch.of(f.A, len(f.A) - 1), G=Sketch.of(f.G, len(f.G) - 1), num_tokens=7)
        for name, f in factors.items()
    }
    assert 0.5 * expected < curvature_of(sketched).predicted_drift(changes) < expected
    assert curvature_of(factors).predicted_drift({"w0": changes["w0"]}) < expected


def test_eigenproblems_are_solved_where_the_matrices_are(curvature, monkeypatch):
    """On a GPU, whatever the factors were read to; there is none here, so that it is the asking that is seen."""
    matrices = edit_matrices(tiny_llama(), [0, 1])
    asked = []

    def moved(factors, device):
        asked.append(device)
        return factors

    monkeypatch.setattr(Factors, "to", moved)
    curvature.spectra.solve_near(matrices)
    assert curvature.spectra.places == {}
    on_gpu = [SimpleNamespace(name=matrices[0].name, parameter=SimpleNamespace(device=torch.device("cuda:1")))]
    curvature.spectra.solve_near(on_gpu)
    for matrix in matrices:
        curvature.spectrum(matrix.name)
    assert asked == [torch.device("cuda:1"), torch.device("cpu")]
    assert merge([curvature]).spectra.places == curvature.spectra.places


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError(), torch.linalg.LinAlgError(), RuntimeError("cusolver error: CUSOLVER_STATUS…")]
)
def test_where_a_gpu_cannot_the_curvature_is_diagonalised_in_main_memory(failure, curvature, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    (name, _) = curvature.factors
    monkeypatch.setattr(Factors, "to", lambda factors, device: (factors, device)[0])
    monkeypatch.setattr(Spectrum, "to", lambda spectrum, device: spectrum)
    curvature.spectra.places[name] = torch.device("cuda:0")
    expected, attempts = Spectrum.of(*curvature.factors[name].dense), []

    def of(A, G):
        attempts.append(len(A))
        if len(attempts) == 1:
            raise failure
        return expected

    monkeypatch.setattr(Spectrum, "of", of)
    assert curvature.spectrum(name) is expected
    assert len(attempts) == 2
    assert "in main memory" in caplog.text


def test_what_else_goes_wrong_on_a_gpu_is_not_taken_for_that(curvature, monkeypatch):
    (name, _) = curvature.factors
    monkeypatch.setattr(Factors, "to", lambda factors, device: factors)
    monkeypatch.setattr(Spectrum, "of", lambda A, G: torch.zeros(2) @ torch.zeros(3))
    curvature.spectra.places[name] = torch.device("cuda:0")
    with pytest.raises(RuntimeError, match="size"):
        curvature.spectrum(name)


def test_a_sketch_that_stays_where_it_is_knows_its_eigenpairs():
    sketch = Sketch.of(random_factor(torch.arange(12, 0, -1.0), seed=0), rank=6)
    assert sketch.to(torch.device("cpu")) is sketch
