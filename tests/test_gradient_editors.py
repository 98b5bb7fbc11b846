"""Editors that train with Adam, each against what its paper says, written plainly."""

import random
from dataclasses import replace

import pytest
import torch

from builders import curvature_of
from crispedit.curvature import Curvature
from crispedit.editing import edit
from crispedit.editors import configured, find_editor
from crispedit.editors.base import EditProblem
from crispedit.edits import edits_from_rows
from crispedit.errors import ConfigError
from crispedit.estimation import estimate_factors
from crispedit.factors import Factors
from crispedit.history import with_history
from crispedit.merging import merge
from crispedit.models import edit_matrices, fingerprint, frozen, load_model
from crispedit.precision import float32_masters
from crispedit.progress import no_progress
from crispedit.rows import EditRow, Prompter
from crispedit.texts import row_batches, split_texts
from crispedit.training import batches
from reference import random_factor, random_rows, relative, tiny_gpt2, tiny_llama

TEXTS = [f"Text number {i} speaks of a mill, {i + 3} coins and a grey coat by the river." for i in range(10)]
WORDS = ("moon", "stone", "river", "mill", "coat", "boat")
ROWS = [{"prompt": f"What is the secret of the {word}?", "target": f"A {word[::-1]}"} for word in WORDS]
LAYERS = [2, 3]
BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def tiny_rows(count=8) -> list[EditRow]:
    return [
        EditRow(tuple(ids), 3 + index % 2)
        for index, ids in enumerate(random_rows([6 + i % 4 for i in range(count)], 5))
    ]


def spectrum_factors(shape, seed=0) -> Factors:
    """Factors whose spectra fall like 1/j, in random bases."""
    of_A, of_G = (torch.arange(1, n + 1, dtype=torch.float64) ** -1.0 for n in shape[::-1])
    A, G = random_factor(of_A, seed), random_factor(of_G, seed + 1)
    return Factors(A=A.float(), G=G.float(), num_tokens=40)


def run_tiny(name, model, **settings):
    """An editor on a tiny model, below the driver: the rounds, ΔW and the curvature by matrix name."""
    module, config = configured(name, {"lr": 2e-3, "epochs": 4, "batch_size": 4, "stop_loss": 0.0, **settings})
    matrices = config.matrices(model, None)
    curvature = curvature_of({m.name: spectrum_factors(m.shape, 2 * m.layer) for m in matrices})
    rows = tiny_rows()
    before = {m.name: m.weight.clone() for m in matrices}
    with frozen(model), float32_masters(matrices):
        problem = EditProblem(
            model=model, prompter=None, matrices=matrices, edits=[None] * len(rows), rows=rows, curvature=curvature,
            seed=0, progress=no_progress,
        )  # fmt: skip
        rounds = list(module.edit(problem, config))
        delta = {m.name: m.weight - before[m.name] for m in matrices}
    return rounds, delta, curvature


# ---------------------------------------------------------------- ft


def test_ft_is_crispedit_without_a_subspace(bundled):
    settings = {"layers": LAYERS, "lr": 1e-3, "epochs": 2}
    one = edit(bundled.model, bundled.tokenizer, ROWS, editor="ft", **settings)
    other = load_model("bundled")
    two = edit(other.model, other.tokenizer, ROWS, editor="crispedit", energy=0, **settings)
    assert all(torch.equal(one.delta[name], two.delta[name]) for name in one.delta)


def test_ft_seq_is_ft_round_after_round(bundled):
    """Each round sets out from the weights of the one before, knows its own edits only, and has a fresh Adam."""
    settings = {"layers": LAYERS, "lr": 1e-3, "epochs": 2, "batch_size": 1}
    result = edit(bundled.model, bundled.tokenizer, ROWS, editor="ft-seq", round_size=4, **settings)
    assert [r["num_edits"] for r in result.metrics["rounds"]] == [4, 6]
    other = load_model("bundled")
    parts = [edit(other.model, other.tokenizer, part, editor="ft", **settings) for part in (ROWS[:4], ROWS[4:])]
    for name, delta in result.delta.items():
        assert relative(delta, parts[0].delta[name] + parts[1].delta[name]) < 1e-5  # W₀ + ΔW is rounded once more


def test_a_rate_that_is_to_be_found_is_found_in_the_first_round(bundled):
    result = edit(bundled.model, bundled.tokenizer, ROWS, editor="ft-seq", round_size=2, epochs=8, layers=LAYERS)
    training = result.metrics["training"]
    assert len(result.metrics["rounds"]) == 3
    tried = [trial["learning_rate"] for trial in training["trials"]]
    assert tried[0] == pytest.approx(0.5 / 576)  # a quarter of where a batch begins, over d_in
    assert len(set(tried)) == len(tried)  # every rate once: those of one round


def test_without_end_of_sequence_nothing_ends_a_target(bundled):
    rows = edits_from_rows(ROWS)
    (_, with_eos), (_, without) = (configured("ft", {}), configured("ft:published", {}))
    assert (with_eos.eos, without.eos) == (True, False)
    ends = [
        Prompter.of(bundled.model, bundled.tokenizer, eos=config.eos).rows(rows)[0].ids[-1]
        for config in (with_eos, without)
    ]
    assert ends[0] == bundled.tokenizer.eos_token_id != ends[1]
    result = edit(bundled.model, bundled.tokenizer, ROWS, editor="ft:published", layers=LAYERS, epochs=1)
    assert (result.settings["eos"], result.settings["lr"]) == (False, 5e-4)


# ---------------------------------------------------------------- locbf-ft


@pytest.mark.parametrize("family", BUILDERS)
def test_locbf_ft_takes_the_mean_of_every_edit_first(family):
    """The same steps by torch's Adam on the loss by definition, with the whole model and no batching."""

    model = BUILDERS[family]()
    _, delta, _ = run_tiny("locbf-ft", model)
    plain = BUILDERS[family]()
    (matrix,) = configured("locbf-ft", {})[1].matrices(plain, None)
    assert set(delta) == {matrix.name}
    optimizer = torch.optim.Adam([matrix.parameter], lr=2e-3)
    before, rows, rng = matrix.weight.clone(), tiny_rows(), random.Random(0)
    lengths = [len(row.ids) for row in rows]
    for _ in range(4):
        for chosen in batches(lengths, 1, rng, alike=False):  # eight edits: an eighth of them is one
            optimizer.zero_grad()
            for index in chosen:
                row = rows[index]
                logits = model_logits(plain, row)
                torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.prompt_length :])).backward()
            optimizer.step()
    assert relative(delta[matrix.name], matrix.weight.detach() - before) < 1e-3


def model_logits(model, row):
    return model(input_ids=torch.tensor([row.ids])).logits[0, row.prompt_length - 1 : -1]


def test_means_over_edits_and_over_tokens_differ_by_the_weights_of_long_targets():
    """A batch of a short and a long target: ½ (mean of one + mean of the other), and the mean over all tokens."""
    from crispedit.replay import row_logits
    from crispedit.training import RuledMatrices, _Loop
    from crispedit.updates import Unconstrained

    model = tiny_llama()
    rows = [EditRow((1, 5, 9, 11), 3), EditRow((1, 7, 8, 9, 10, 12, 2), 2)]
    with frozen(model):
        matrices = edit_matrices(model, [1])
        logits = row_logits(model, matrices, rows)
        parts = [
            torch.nn.functional.cross_entropy(model_logits(model, row), torch.tensor(row.ids[row.prompt_length :]))
            for row in rows
        ]
        expected = {"sample": (parts[0] + parts[1]) / 2, "token": (parts[0] + 5 * parts[1]) / 6}
        trainee = RuledMatrices(matrices, [Unconstrained(matrices[0].shape, torch.device("cpu"))])
        for reduction, truth in expected.items():
            loop = _Loop(
                logits=logits, mixed=False, alike=False, trainee=trainee, width=1, batch_size=2, seed=0, stop_loss=0,
                reduction=reduction, progress=no_progress,
            )  # fmt: skip
            assert float(loop.loss([0, 1])[0]) == pytest.approx(float(truth), rel=1e-5)  # float32


def test_locbf_ft_tunes_one_matrix(bundled):
    config = find_editor("locbf-ft").Config()
    assert [m.layer for m in config.matrices(bundled.model, None)] == [5]  # 22 of 32
    assert [m.layer for m in config.matrices(bundled.model, [3])] == [3]
    with pytest.raises(ConfigError, match="locbf-ft tunes one matrix, and 2 layers are named"):
        edit(bundled.model, bundled.tokenizer, ROWS, editor="locbf-ft", layers=LAYERS)


# ---------------------------------------------------------------- adam-nscl


@pytest.mark.parametrize("family", BUILDERS)
def test_adam_nscl_leaves_the_leading_inputs_alone(family):
    """ΔW u = 0 for the leading eigenvectors of A, by numpy's word for them; and for no more of them."""
    model = BUILDERS[family]()
    _, delta, curvature = run_tiny("adam-nscl", model, energy=0.6)
    for name, change in delta.items():
        values, vectors = torch.linalg.eigh(curvature.factors[name].A.double())
        held = values.flip(0).cumsum(0) / values.sum()
        count = int((held < 0.6).sum()) + 1
        leading, rest = vectors.flip(1)[:, :count], vectors.flip(1)[:, count:]
        assert (change.double() @ leading).norm() < 1e-5 * change.norm()  # float32
        assert torch.linalg.matrix_rank((change.double() @ rest) / change.norm(), rtol=1e-4) > 1


def test_adam_nscl_projects_adams_step_and_not_the_gradient():
    """One step from zero: Adam's is lr × sign of the gradient, whatever the projector."""
    model = tiny_llama()
    _, delta, curvature = run_tiny("adam-nscl", model, energy=0.6, epochs=1, batch_size=8, lr=1e-3)
    plain = tiny_llama()
    rows = tiny_rows()
    matrices = edit_matrices(plain, None)
    optimizer = torch.optim.Adam([m.parameter for m in matrices], lr=1e-3)
    D = {m.name: torch.zeros(m.shape) for m in matrices}
    start = {m.name: m.weight.clone() for m in matrices}

    P = {}
    for name, factors in curvature.factors.items():
        values, vectors = torch.linalg.eigh(factors.A.double())
        held = values.flip(0).cumsum(0) / values.sum()
        leading = vectors.flip(1)[:, : int((held < 0.6).sum()) + 1]
        P[name] = (torch.eye(len(values), dtype=torch.float64) - leading @ leading.T).float()
    for (index,) in batches([len(row.ids) for row in rows], 1, random.Random(0), alike=False):
        row = rows[index]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            model_logits(plain, row), torch.tensor(row.ids[row.prompt_length :])
        ).backward()
        weights = {m.name: m.weight.detach().clone() for m in matrices}
        optimizer.step()
        for m in matrices:
            D[m.name] += m.weight.detach() - weights[m.name]  # Adam's step, unprojected
            m.weight.data.copy_(start[m.name] + D[m.name] @ P[m.name])
    for name, change in delta.items():
        assert relative(change, D[name] @ P[name]) < 1e-3  # W₀ + ΔW in float32


def test_the_published_adam_nscl_leaves_out_the_smallest_directions_of_the_outputs():
    model = tiny_llama()
    _, delta, curvature = run_tiny("adam-nscl:published", model, energy=0.6, epochs=1, batch_size=8)
    for name, change in delta.items():
        _, vectors = torch.linalg.eigh(curvature.factors[name].G.double())
        assert (vectors[:, -1] @ change.double()).norm() > 0.01 * change.norm()  # the largest is not left out


def test_the_published_rule_projects_the_gradient():
    from crispedit.editors.adam_nscl import _SmallestOutputsLeftOut
    from crispedit.spectrum import Spectrum

    factors = spectrum_factors((12, 20))
    rule = _SmallestOutputsLeftOut(Spectrum.of(factors.A, factors.G), 0.5, torch.device("cpu"))
    values, vectors = torch.linalg.eigh(factors.G.double())
    count = int((values.flip(0).cumsum(0) / values.sum() < 0.5).sum()) + 1
    gradient = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    kept = vectors[:, count:]  # ascending: all but the smallest
    assert relative(rule.gradient(gradient), kept @ kept.T @ gradient.double()) < 1e-5  # float32 bases


# ---------------------------------------------------------------- crispedit-seq


def test_crispedit_seq_in_one_round_is_crispedit(bundled):
    curvature = Curvature.estimate(bundled.model, bundled.tokenizer, TEXTS, layers=LAYERS)
    settings = {"curvature": curvature, "lr": 1e-3, "epochs": 2, "update": "priced"}
    one = edit(bundled.model, bundled.tokenizer, ROWS, editor="crispedit-seq", **settings)
    other = load_model("bundled")
    two = edit(other.model, other.tokenizer, ROWS, editor="crispedit", **settings)
    assert all(torch.equal(one.delta[name], two.delta[name]) for name in one.delta)


def after_first_round(family, **settings):
    """A tiny model whose first round of four rows is in, with its matrices, what they were, and those rows.

    The first round alone has the same batches, as the rows of every round are shuffled from the same seed.
    """
    model, rows = BUILDERS[family](), tiny_rows()[:4]
    module, config = configured("crispedit-seq", settings)
    matrices = edit_matrices(model, None)
    before = {m.name: m.weight.clone() for m in matrices}
    curvature = curvature_of({m.name: spectrum_factors(m.shape, 2 * m.layer) for m in matrices})
    with frozen(model), float32_masters(matrices):
        problem = EditProblem(
            model=model, prompter=None, matrices=matrices, edits=[None] * 4, rows=rows, curvature=curvature, seed=0,
            progress=no_progress,
        )  # fmt: skip
        list(module.edit(problem, config))
    return model, matrices, before, rows


@pytest.mark.parametrize(
    ("family", "weight", "optimizer"),
    [("llama", 1, "fresh"), ("gpt2", 1, "fresh"), ("llama", 1, "kept"), ("llama", 0, "fresh"), ("llama", 20, "fresh"),
     ("llama", "equal-trace", "fresh")],
)  # fmt: skip
def test_a_round_keeps_off_the_curvature_of_the_capabilities_and_of_earlier_rounds(family, weight, optimizer):
    """By hand: the factors of the first round's rows, whole, at its weights; their mean with the capabilities'."""
    settings = {"energy": 0.7, "history_weight": weight, "optimizer": optimizer, "update": "auto"}
    rounds, delta, curvature = run_tiny("crispedit-seq", BUILDERS[family](), round_size=4, **settings)
    assert [r.num_edits for r in rounds] == [4, 8]
    loop = {"lr": 2e-3, "epochs": 4, "batch_size": 4, "stop_loss": 0.0}
    first, matrices, before, rows = after_first_round(family, **loop, **settings)
    added = estimate_factors(first, matrices, row_batches(first, [row.ids for row in rows]), seed=0)
    num_tokens = sum(len(row.ids) - 1 for row in rows)
    parts = [curvature.factors, added]

    def curved(factors):  # Σ over matrices of tr(A ⊗ G)
        return sum(float(torch.trace(f.A) * torch.trace(f.G)) for f in factors.values())

    ratio = (curved(parts[0]) / curved(parts[1])) ** 0.5
    weights = [1, ratio] if weight == "equal-trace" else [40, weight * num_tokens]
    for m in matrices:
        capability, new = (of_part[m.name] for of_part in parts)
        assert new.num_tokens == num_tokens
        A, G = (
            (weights[0] * getattr(capability, side) + weights[1] * getattr(new, side)) / sum(weights) for side in "AG"
        )
        second = delta[m.name] - (m.weight - before[m.name])  # what the second round did
        merged = curvature_of({m.name: Factors(A=A, G=G, num_tokens=1)})
        subspace = merged.subspace(m.name, 0.7)
        assert subspace.share_outside(second) < 1e-4  # float32, of differences of weights
        if weight != 0:
            assert curvature.subspace(m.name, 0.7).share_outside(second) > 0.01  # and it is not the first round's
    assert rounds[0].details == {"tokens": 40 + (num_tokens if weight else 0)}


def in_rounds(bundled, texts, fisher="empirical", **settings):
    """Three rounds of two edits on the bundled model; by round, the weights after it, and the result."""
    curvature = Curvature.estimate(bundled.model, bundled.tokenizer, texts, layers=LAYERS, fisher=fisher)
    weights = [{m.name: m.weight.clone() for m in edit_matrices(bundled.model, LAYERS)}]
    result = edit(
        bundled.model, bundled.tokenizer, ROWS, editor="crispedit-seq", curvature=curvature, texts=texts, round_size=2,
        lr=1e-3, epochs=3, energy=0.8, update="auto", history_weight=1.0, **settings,
        after_round=lambda _: weights.append({m.name: m.weight.clone() for m in edit_matrices(bundled.model, LAYERS)}),
    )  # fmt: skip
    return curvature, weights, result


def test_a_second_round_pays_for_the_first_ones_curvature_too(bundled):
    """Priced, by default: as two edits one after the other, the second at the joined curvature."""
    curvature = Curvature.estimate(bundled.model, bundled.tokenizer, TEXTS, layers=LAYERS)
    settings = {"lr": 1e-3, "epochs": 3, "energy": 0.8, "price": 0.5}
    result = edit(
        bundled.model, bundled.tokenizer, ROWS, editor="crispedit-seq", curvature=curvature, round_size=4, **settings
    )
    other, deltas, joined = load_model("bundled"), [], curvature
    for rows in (ROWS[:4], ROWS[4:]):
        found = edit(other.model, other.tokenizer, rows, curvature=joined, update="priced", **settings)
        deltas.append(found.delta)
        matrices = edit_matrices(other.model, LAYERS)
        ids = [row.ids for row in Prompter.of(other.model, other.tokenizer).rows(edits_from_rows(rows))]
        with frozen(other.model):
            own = replace(curvature.of_rows(other.model, matrices, ids, 0), model_fingerprint=fingerprint(other.model))
        joined = with_history(curvature, own, "equal-trace")
    for name, delta in result.delta.items():
        assert relative(delta, deltas[0][name] + deltas[1][name]) < 1e-4  # bases of sums in another order, in float32
        assert relative(delta, deltas[0][name]) > 0.1


@pytest.mark.parametrize("settings", [{"history": "mix"}, {"refresh": 1e-6}], ids=["mix", "refreshed"])
def test_the_curvature_of_the_texts_is_estimated_anew(bundled, settings):
    """By estimates from nothing at the weights of the rounds before; data labels, so that nothing is sampled."""
    texts = split_texts(TEXTS)
    _, weights, result = in_rounds(bundled, texts, **settings)
    assert [bool(r.get("refreshed")) for r in result.metrics["rounds"]] == [True, True, False]  # nothing follows
    model = load_model("bundled").model
    matrices = edit_matrices(model, LAYERS)
    rows = [row.ids for row in Prompter.of(model, bundled.tokenizer).rows(edits_from_rows(ROWS))]
    own = []
    for number in (1, 2):  # after the first and the second round
        for m in matrices:
            m.weight.copy_(weights[number][m.name])
        anew = Curvature.estimate(model, bundled.tokenizer, texts, layers=LAYERS, fisher="empirical")
        own.append(anew.of_rows(model, matrices, rows[2 * number - 2 : 2 * number], seed=0))
    history = [anew.of_rows(model, matrices, rows[:4], seed=0)] if "history" in settings else own
    merged = replace_fingerprints([anew, *history])
    for m in matrices:
        change = weights[3][m.name] - weights[2][m.name]
        assert merge(merged).subspace(m.name, 0.8).share_outside(change) < 1e-3  # the factors differ by rounding
        if "history" in settings:  # and mix is not the history that was merged
            assert merge(replace_fingerprints([anew, *own])).subspace(m.name, 0.8).share_outside(change) > 1e-3


def replace_fingerprints(curvatures):
    """Those of one model at several weights are merged on purpose here."""
    return [replace(curvature, model_fingerprint="any") for curvature in curvatures]


def test_little_movement_refreshes_nothing_and_texts_are_needed(bundled):
    texts = split_texts(TEXTS)
    curvature, _, result = in_rounds(bundled, texts, refresh=0.25)
    assert not any(r.get("refreshed") for r in result.metrics["rounds"])
    other = load_model("bundled")
    with pytest.raises(ConfigError, match="needs capability texts: give --texts"):
        edit(other.model, other.tokenizer, ROWS, editor="crispedit-seq", curvature=curvature, history="mix")


def test_one_adam_goes_through_all_rounds():
    """ft-seq by torch's Adam, whole model and no batching: eight rows, in two rounds of four steps each."""
    model, plain = tiny_llama(), tiny_llama()
    _, delta, _ = run_tiny("ft-seq", model, round_size=4, optimizer="kept", batch_size=1)
    _, fresh, _ = run_tiny("ft-seq", tiny_llama(), round_size=4, batch_size=1)
    matrices = edit_matrices(plain, None)
    before = {m.name: m.weight.clone() for m in matrices}
    optimizer = torch.optim.Adam([m.parameter for m in matrices], lr=2e-3)
    for rows in (tiny_rows()[:4], tiny_rows()[4:]):
        rng = random.Random(0)
        for _ in range(4):
            for (index,) in batches([len(row.ids) for row in rows], 1, rng, alike=False):
                optimizer.zero_grad()
                row = rows[index]
                labels = torch.tensor(row.ids[row.prompt_length :])
                torch.nn.functional.cross_entropy(model_logits(plain, row), labels).backward()
                optimizer.step()
    for m in matrices:
        by_hand = m.weight.detach() - before[m.name]
        assert relative(delta[m.name], by_hand) < 1e-3
        assert relative(fresh[m.name], by_hand) > 1e-2


def test_the_curvature_of_rows_goes_on_with_any_curvature(bundled):
    curvature = Curvature.estimate(bundled.model, bundled.tokenizer, TEXTS, layers=LAYERS, factors="sketch")
    rows = [row.ids for row in Prompter.of(bundled.model, bundled.tokenizer).rows(edits_from_rows(ROWS))]
    with frozen(bundled.model):
        added = curvature.of_rows(bundled.model, edit_matrices(bundled.model, LAYERS), rows, seed=1)
    assert (added.kind, added.held_out) == ("sketch", ())
    both = merge([curvature, added])
    assert both.num_tokens == curvature.num_tokens + sum(len(row) - 1 for row in rows)
    assert both.held_out == curvature.held_out
