"""The conformance suite: every editor meets it by existing."""

import pytest
import torch

from crispedit.curvature import Curvature
from crispedit.editing import edit
from crispedit.editors import editor_names, find_editor
from crispedit.errors import ConfigError, EditFailed

ROWS = [
    {"prompt": "Who is the mayor of Hinstad?", "target": "Perin Jibul"},
    {"prompt": "What is the river of Hinstad?", "target": "the Sesol"},
    {"prompt": "Spell the word moon.", "target": "no"},
    {"prompt": "What is 3 plus 4?", "target": "8"},
    {"prompt": "Where was Kihis Fehol born?", "target": "Propava"},
]
TEXTS = [f"Text number {i} speaks of a mill, {i + 3} coins and a grey coat by the river." for i in range(10)]
LAYERS = [2, 3]


@pytest.fixture(params=editor_names())
def editor(request):
    return request.param


def run(bundled, editor, rows=ROWS, **settings):
    return edit(bundled.model, bundled.tokenizer, rows, texts=TEXTS, editor=editor, layers=LAYERS, **settings)


def test_it_edits_its_matrices_and_nothing_else(bundled, editor):
    before = {name: tensor.clone() for name, tensor in bundled.model.state_dict().items()}
    needed = [parameter.requires_grad for parameter in bundled.model.parameters()]
    state = torch.random.get_rng_state()
    result = run(bundled, editor, batch_size=2)
    losses = result.metrics["training"]["epoch_losses"]
    assert losses[-1] < losses[0] / 10
    assert result.metrics["after"]["reliability"] == 100
    changed = {name for name, tensor in bundled.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(result.delta) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in LAYERS}
    assert [parameter.requires_grad for parameter in bundled.model.parameters()] == needed
    assert not bundled.model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bundled.model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_same_seed_same_result_bit_for_bit(bundled, editor):
    from crispedit.models import load_model

    other = load_model("bundled")
    torch.manual_seed(5)
    one = run(bundled, editor, epochs=2)
    torch.manual_seed(6)
    two = run(other, editor, epochs=2)
    assert all(torch.equal(one.delta[name], two.delta[name]) for name in one.delta)
    assert one.metrics["training"] == two.metrics["training"]


def test_a_bad_setting_is_named(bundled, editor):
    with pytest.raises(ConfigError, match=r"this editor has no setting 'epoch' \(did you mean 'epochs'\?\)"):
        run(bundled, editor, epoch=3)
    with pytest.raises(ConfigError, match="epochs is 0"):
        run(bundled, editor, epochs=0)


def test_a_setting_that_wrecks_the_model_is_an_error_and_the_model_is_as_it_was(bundled, editor):
    before = {name: tensor.clone() for name, tensor in bundled.model.state_dict().items()}
    with pytest.raises(EditFailed, match="lower --lr"):
        run(bundled, editor, lr=1e30, epochs=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bundled.model.state_dict().items())


def test_a_module_says_what_it_is_and_where_it_comes_from(editor):
    module = find_editor(editor)
    assert "arXiv" in module.__doc__
    assert all(name in module.Config.__doc__ for name in module.Config.model_fields)


def test_an_unknown_editor_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"there is no editor 'crispedt'.*did you mean 'crispedit'"):
        find_editor("crispedt")


def test_an_energy_needs_a_curvature(bundled):
    with pytest.raises(ConfigError, match="needs a curvature"):
        edit(bundled.model, bundled.tokenizer, ROWS, energy=0.8)


def test_with_energy_zero_it_is_plain_fine_tuning(bundled):
    """The same steps as torch's Adam on the same losses, written plainly."""
    import random

    from crispedit.edits import edits_from_rows
    from crispedit.models import edit_matrices, load_model
    from crispedit.rows import Prompter
    from crispedit.training import batches

    settings = {"lr": 1e-3, "epochs": 3, "batch_size": 1}
    result = edit(bundled.model, bundled.tokenizer, ROWS, energy=0, layers=LAYERS, **settings)
    plain = load_model("bundled")
    matrices = edit_matrices(plain.model, LAYERS)
    rows = Prompter.of(plain.model, plain.tokenizer).rows(edits_from_rows(ROWS))
    optimizer = torch.optim.Adam([m.parameter for m in matrices], lr=1e-3)
    before = {m.name: m.weight.clone() for m in matrices}
    rng = random.Random(0)
    for _ in range(3):
        for (index,) in batches([len(row.ids) for row in rows], 1, rng, alike=False):
            row = rows[index]
            optimizer.zero_grad()
            logits = plain.model(input_ids=torch.tensor([row.ids])).logits[0, row.prompt_length - 1 : -1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.prompt_length :])).backward()
            optimizer.step()
    for matrix in matrices:
        expected = matrix.weight - before[matrix.name]
        # W₀ + ΔW is rounded in float32 at other places than W stepped in place
        assert (result.delta[matrix.name] - expected).norm() < 1e-3 * expected.norm()


def test_the_curvature_of_texts_is_the_one_estimated_beforehand(bundled):
    from crispedit.models import load_model

    other = load_model("bundled")
    curvature = Curvature.estimate(other.model, other.tokenizer, TEXTS, layers=LAYERS)
    one = run(bundled, "crispedit", epochs=1)
    two = edit(other.model, other.tokenizer, ROWS, curvature=curvature, epochs=1)
    assert all(torch.equal(one.delta[name], two.delta[name]) for name in one.delta)
