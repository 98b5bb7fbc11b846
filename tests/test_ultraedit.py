"""UltraEdit against its equations written plainly in float64, and what it takes its numbers from.

Everything is float32 sums of a few hundred products of numbers of one sign at the most, so 1e-5 in Frobenius norm where
nothing is ill-conditioned. The closed form is solved in float64; its system has condition numbers up to ‖H‖² / λ, about
1e4 here, so that rounded inputs may move it by 1e-7 × 1e4.
"""

import pytest
import torch
from torch import nn

from crispedit.editing import edit
from crispedit.editors._capture import RunningMoments, capture
from crispedit.editors.base import EditProblem
from crispedit.editors.ultraedit import Config, default_parts, ridge_regression
from crispedit.editors.ultraedit import edit as ultraedit
from crispedit.errors import ConfigError, NumericsError
from crispedit.models import edit_matrices, frozen
from crispedit.precision import float32_masters
from crispedit.progress import no_progress
from crispedit.rows import EditRow
from families import tiny_model, tiny_tokenizer
from reference import random_rows, relative, run_with_offset, tiny_gpt2, tiny_llama

TOLERANCE = 1e-5
ROWS = [
    EditRow(tuple(ids), max(1, len(ids) - targets))
    for ids, targets in zip(random_rows([6, 9, 4, 12, 7, 5, 8]), [2, 3, 1, 4, 2, 1, 3], strict=True)
]
EDITS = [
    {"prompt": "Who is the mayor of Hinstad?", "target": "Perin Jibul"},
    {"prompt": "What is the river of Hinstad?", "target": "the Sesol"},
    {"prompt": "Where was Kihis Fehol born?", "target": "Propava"},
]


def problem_of(model, matrices, rows=ROWS) -> EditProblem:
    return EditProblem(
        model=model,
        prompter=None,
        matrices=matrices,
        edits=[None] * len(rows),
        rows=rows,
        curvature=None,
        seed=0,
        progress=no_progress,
    )


def deltas(model, config, rows=ROWS, layers=(0, 1)) -> dict[str, torch.Tensor]:
    """What the editor adds to the matrices of a model, which is left as it was."""
    matrices = config.matrices(model, layers)
    before = {m.name: m.weight.clone() for m in matrices}
    with frozen(model), float32_masters(matrices):
        list(ultraedit(problem_of(model, matrices, rows), config))
        after = {m.name: m.weight.clone() for m in matrices}
    for m in matrices:
        m.weight.copy_(before[m.name])
    return {name: after[name] - before[name].float() for name in after}


def factors_plainly(model, matrix, rows, tokens="answer"):
    """(h, g) of every chosen token, one row at a time in float64, each row's loss summed over its targets."""
    inputs, gradients, owners = [], [], []
    for number, row in enumerate(rows):
        logits, a, offset = run_with_offset(model, matrix, row.ids)
        at = range(row.prompt_length - 1, len(row.ids) - 1)
        loss = sum(-logits[t].log_softmax(-1)[row.ids[t + 1]] for t in at)
        (g,) = torch.autograd.grad(loss, offset)
        chosen = list(at if tokens == "answer" else range(len(row.ids) - 1))
        inputs.append(a[chosen])
        gradients.append(g[chosen])
        owners += [number] * len(chosen)
    return torch.cat(inputs).double(), torch.cat(gradients).double(), owners


# ---------------------------------------------------------------- capture


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_inputs_and_gradients_are_those_of_single_rows(build, tokens, batch_size):
    model = build()
    matrices = edit_matrices(model, [0, 1], ("up", "down"))
    found = capture(model, matrices, ROWS, tokens=tokens, batch_size=batch_size)
    for matrix in matrices:
        h, g, owners = factors_plainly(model, matrix, ROWS, tokens)
        of_matrix = found.factors[matrix.name]
        if matrix.layer == 1:  # the last block: what nothing reads has no gradient, and is left out
            read = g.abs().sum(1) > 0
            h, g, owners = h[read], g[read], [owner for owner, keep in zip(owners, read, strict=True) if keep]
        assert of_matrix.rows.tolist() == owners
        assert relative(of_matrix.inputs, h) < TOLERANCE
        assert relative(of_matrix.gradients, g) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3"])
def test_pairs_of_all_tokens_make_the_gradient(name):
    model = tiny_model(name)
    matrices = edit_matrices(model, [1, 3], ("gate", "up", "down"))
    found = capture(model, matrices, ROWS, tokens="all", batch_size=4)
    logits = [model(input_ids=torch.tensor([row.ids])).logits[0, row.prompt_length - 1 : -1] for row in ROWS]
    labels = [torch.tensor(row.ids[row.prompt_length :]) for row in ROWS]
    loss = nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels), reduction="sum")
    truth = torch.autograd.grad(loss, [m.parameter for m in matrices])
    assert found.total == pytest.approx(float(loss.detach()), rel=1e-5)
    for matrix, gradient in zip(matrices, truth, strict=True):
        of_matrix = found.factors[matrix.name]
        assert relative(of_matrix.gradients.T @ of_matrix.inputs, matrix.as_weight(gradient)) < TOLERANCE


def test_the_mean_over_a_batch_is_the_sum_divided_by_its_targets():
    model = tiny_llama()
    matrices = edit_matrices(model, [0])
    summed = capture(model, matrices, ROWS, batch_size=7)
    mean = capture(model, matrices, ROWS, reduction="mean", batch_size=7)
    targets = sum(row.num_targets for row in ROWS)
    name = matrices[0].name
    assert relative(mean.factors[name].gradients * targets, summed.factors[name].gradients) < TOLERANCE


# ---------------------------------------------------------------- normaliser


def test_running_moments_are_those_of_all_rows_at_once():
    generator = torch.Generator().manual_seed(0)
    rows = 1000 + torch.randn(50, 6, generator=generator) * torch.tensor([1, 1e-3, 10, 1, 5, 1])
    moments = RunningMoments(6, torch.device("cpu"))
    for part in torch.split(rows, [1, 1, 17, 0, 30, 1]):
        moments.update(part)
    variance, mean = torch.var_mean(rows.double(), dim=0)
    assert torch.allclose(moments.mean, mean, rtol=1e-14)
    assert torch.allclose(
        moments.std, variance.sqrt(), rtol=1e-10
    )  # float64; a cancellation of 1e6² costs 1e-12 … 1e-10
    assert torch.allclose(moments.normalised(rows).double(), (rows.double() - mean) / variance.sqrt(), atol=1e-6)


def test_one_row_gives_no_nan_and_a_coordinate_that_does_not_vary_gives_zero():
    moments = RunningMoments(3, torch.device("cpu"))
    moments.update(torch.tensor([[1.0, 2.0, 0.1]]))
    assert torch.equal(moments.normalised(torch.tensor([[4.0, 5.0, 6.0]])), torch.tensor([[4.0, 5.0, 6.0]]))
    for value in (3.0, 5.0, 8.0):
        moments.update(torch.tensor([[value, value, 0.1]]))
    normalised = moments.normalised(torch.tensor([[1.0, 2.0, 0.1]]))
    assert torch.isfinite(normalised).all()
    assert normalised[0, 2] == 0
    assert normalised[0, 0] != 0


# ---------------------------------------------------------------- closed form


@pytest.mark.parametrize(("tokens", "d_in"), [(5, 12), (12, 12), (40, 12)])
def test_the_closed_form_solves_the_normal_equations(tokens, d_in):
    generator = torch.Generator().manual_seed(1)
    H, U = torch.randn(tokens, d_in, generator=generator), torch.randn(tokens, 7, generator=generator)
    truth = torch.linalg.solve(H.double().T @ H.double() + 0.3 * torch.eye(d_in), H.double().T @ U.double()).T
    assert relative(ridge_regression(H, U, 0.3), truth) < 1e-6  # float32 holds the result


def test_the_closed_form_is_the_least_of_what_it_minimises():
    generator = torch.Generator().manual_seed(2)
    H, U = (torch.randn(6, width, generator=generator).double() for width in (9, 4))
    D = ridge_regression(H, U, 0.5).double().requires_grad_()
    ((H @ D.T - U).square().sum() + 0.5 * D.square().sum()).backward()
    assert D.grad.abs().max() < 1e-5  # D is rounded to float32


@pytest.mark.parametrize("rounds", [3, 7])
@pytest.mark.parametrize("normaliser", ["kept", "round"])
def test_rounds_are_the_equations_written_plainly(rounds, normaliser):
    config = Config(lr=1e-4, round_size=rounds, normaliser=normaliser, eos=False)
    found = deltas(tiny_llama(), config)
    model = tiny_llama(torch.float64)
    matrices = config.matrices(model, (0, 1))
    starts = {m.name: m.weight.clone() for m in matrices}
    seen: list[torch.Tensor] = []
    for first in range(0, len(ROWS), rounds):
        pairs = {m.name: factors_plainly(model, m, ROWS[first : first + rounds])[:2] for m in matrices}
        if normaliser == "round":
            seen.clear()
        seen += [torch.cat(pair, dim=1) for pair in pairs.values()]  # all matrices have one shape here
        variance, mean = torch.var_mean(torch.cat(seen), dim=0)
        for m in matrices:
            h, g = pairs[m.name]
            z = (torch.cat([h, g], dim=1) - mean) / variance.sqrt()
            wanted = -1e-4 * (z[:, :32] ** 2).sum(1, keepdim=True) * z[:, 32:]
            m.weight.add_(torch.linalg.solve(h.T @ h + torch.eye(32, dtype=h.dtype), h.T @ wanted).T)
    for m in matrices:
        assert relative(found[m.name], m.weight - starts[m.name]) < 1e-4


def test_order_within_a_round_does_not_matter_and_that_of_rounds_does():
    config = Config(lr=1e-3, round_size=7)
    one, other = deltas(tiny_llama(), config), deltas(tiny_llama(), config, ROWS[::-1])
    assert all(relative(one[name], other[name]) < 1e-4 for name in one)
    config = Config(lr=1e-3, round_size=3)
    one, other = deltas(tiny_llama(), config), deltas(tiny_llama(), config, ROWS[::-1])
    assert all(relative(one[name], other[name]) > 1e-2 for name in one)


def test_batches_of_the_backward_pass_do_not_matter_unless_the_loss_is_their_mean():
    one, other = (deltas(tiny_llama(), Config(lr=1e-3, batch_size=size)) for size in (1, 7))
    assert all(relative(one[name], other[name]) < 1e-4 for name in one)
    one, other = (deltas(tiny_llama(), Config(lr=1e-3, batch_size=size, reduction="mean")) for size in (1, 7))
    assert all(relative(one[name], other[name]) > 1e-2 for name in one)


# ---------------------------------------------------------------- the size of a step


def test_auto_takes_its_share_of_the_loss_away_to_first_order():
    """With all tokens the slope is that of the loss itself; a step of 1e-3 of the loss bends by less than 2 %."""
    model = tiny_llama()
    config = Config(strength=1e-3, tokens="all", round_size=7)
    matrices = config.matrices(model, (0, 1))
    with frozen(model), float32_masters(matrices):
        (only,) = ultraedit(problem_of(model, matrices), config)
    before, after = only.details["loss_before"], only.details["loss_after"]
    assert (before - after) / before == pytest.approx(1e-3, rel=2e-2)


def test_a_step_is_linear_in_lr():
    one, other = (deltas(tiny_llama(), Config(lr=lr)) for lr in (1e-4, 3e-4))
    assert all(relative(other[name], 3 * one[name]) < 1e-3 for name in one)  # weights are rounded in float32


def test_a_rate_that_wrecks_the_model_is_an_error():
    with pytest.raises(NumericsError, match="lower --lr"):
        deltas(tiny_llama(), Config(lr=1e30))


# ---------------------------------------------------------------- which matrices, which models


def test_default_parts_are_the_published_ones_of_32_blocks():
    assert default_parts(32) == ((11, 12, 13, 14, 15), (18, 19, 20, 21, 22, 23, 24))
    assert default_parts(8) == ((2, 3), (4, 5, 6))
    for blocks in range(1, 130):
        gates, ups = default_parts(blocks)
        assert gates
        assert ups
        assert 0 <= gates[0] <= gates[-1] < blocks
        assert 0 <= ups[0] <= ups[-1] < blocks


def test_layers_name_blocks_for_both():
    names = [m.name.split(".", 2)[2] for m in Config().matrices(tiny_model("llama"), [1, 2])]
    assert names == [f"{layer}.mlp.{part}_proj.weight" for layer in (1, 2) for part in ("gate", "up")]
    assert len({m.name for m in Config().matrices(tiny_model("phi3"), None)}) == len(
        Config().matrices(tiny_model("phi3"), None)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_it_teaches_models_of_many_kinds(name, dtype):
    model = tiny_model(name, dtype=dtype)
    result = edit(model, tiny_tokenizer(), EDITS, editor="ultraedit")
    assert result.metrics["edit_loss"]["after"] < result.metrics["edit_loss"]["before"]
    assert {m.name for m in Config().matrices(model, None)} == set(result.delta)


def test_one_edit_of_one_token_gives_numbers():
    model = tiny_llama()
    found = deltas(model, Config(), [EditRow((5, 6, 7), 2)], layers=(0,))
    assert all(torch.isfinite(change).all() and change.norm() > 0 for change in found.values())


def test_presets_and_bad_settings():
    assert Config.of({}, "published").lr == 1e-6
    assert Config.of({}, "easyedit").normaliser == "round"
    with pytest.raises(ConfigError, match="ridge is 0"):
        Config.of({"ridge": 0})
