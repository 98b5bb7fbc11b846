"""The conformance suite: every editor meets it by existing."""

import random

import pytest
import torch

from crispedit.bundled.world import edit_rows
from crispedit.curvature import Curvature
from crispedit.editing import edit
from crispedit.editors import configured, describe_editor, editor_names, find_editor
from crispedit.edits import edits_from_rows
from crispedit.errors import ConfigError, EditFailed, EditsError
from crispedit.models import load_model

ROWS = [
    {"prompt": "Who is the mayor of Hinstad?", "target": "Perin Jibul", "subject": "Hinstad"},
    {"prompt": "What is the river of Hinstad?", "target": "the Sesol", "subject": "Hinstad"},
    {"prompt": "Spell the word moon.", "target": "no", "subject": "moon"},
    {"prompt": "What is 3 plus 4?", "target": "8", "subject": "3 plus 4"},
    {"prompt": "Where was Kihis Fehol born?", "target": "Propava", "subject": "Kihis Fehol"},
]
TEXTS = [f"Text number {i} speaks of a mill, {i + 3} coins and a grey coat by the river." for i in range(10)]
LAYERS = [2, 3]
OTHERS = edits_from_rows(edit_rows("train")[:40])
FAST = {"mend": {"steps": 20, "edits_per_step": 5}}
"""Editors that learn how to edit need not learn it well here."""


@pytest.fixture(params=editor_names())
def editor(request):
    return request.param


def run(bundled, editor, rows=ROWS, **settings):
    """An edit in the editor's own layers, with those of the settings that it has."""
    known = find_editor(editor).Config.model_fields
    chosen = FAST.get(editor, {}) | {name: value for name, value in settings.items() if name in known}
    return edit(bundled.model, bundled.tokenizer, rows, texts=TEXTS, editor=editor, train_edits=OTHERS, **chosen)


def global_state():
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        random.getstate(),
        torch.random.get_rng_state().tolist(),
    )


def test_it_edits_its_matrices_and_nothing_else(bundled, editor):
    """Not a tensor, a module, a hook, a flag or a random state is other than it was, but for the declared matrices."""
    model, Config = bundled.model, find_editor(editor).Config
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    needed = [parameter.requires_grad for parameter in model.parameters()]
    config, state = model.config.to_dict(), global_state()
    result = run(bundled, editor, batch_size=2)
    loss = result.metrics["edit_loss"]
    assert loss["after"] < loss["before"]
    if Config.lowers_loss:
        assert result.metrics["after"]["reliability"] == 100
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(result.delta) == {matrix.name for matrix in Config().matrices(model, None)}
    assert [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._backward_hooks or module._backward_pre_hooks for module in model.modules())
    assert (model.config.to_dict(), global_state()) == (config, state)


def test_same_seed_same_result_bit_for_bit(bundled, editor):
    other = load_model("bundled")
    torch.manual_seed(5)
    one = run(bundled, editor, epochs=2, steps=5)
    torch.manual_seed(6)
    two = run(other, editor, epochs=2, steps=5)
    assert all(torch.equal(one.delta[name], two.delta[name]) for name in one.delta)
    assert one.metrics["training"] == two.metrics["training"]
    assert one.metrics["rounds"] == two.metrics["rounds"]


def test_a_bad_setting_is_named(bundled, editor):
    with pytest.raises(ConfigError, match=r"this editor has no setting 'no_such'; it has .*eos"):
        edit(bundled.model, bundled.tokenizer, ROWS, texts=TEXTS, editor=editor, no_such=3)
    with pytest.raises(ConfigError, match="eos is 'perhaps'"):
        edit(bundled.model, bundled.tokenizer, ROWS, texts=TEXTS, editor=editor, eos="perhaps")
    with pytest.raises(ConfigError, match="this editor has no preset 'publisht'"):
        edit(bundled.model, bundled.tokenizer, ROWS, texts=TEXTS, editor=f"{editor}:publisht")


def test_a_setting_that_wrecks_the_model_is_an_error_and_the_model_is_as_it_was(bundled, editor):
    if "lr" not in find_editor(editor).Config.model_fields or not find_editor(editor).Config.lowers_loss:
        pytest.skip("it has no learning rate")
    before = {name: tensor.clone() for name, tensor in bundled.model.state_dict().items()}
    with pytest.raises(EditFailed, match="lower --lr"):
        run(bundled, editor, lr=1e30, epochs=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bundled.model.state_dict().items())


def test_a_module_says_what_it_is_and_where_it_comes_from(editor):
    about = describe_editor(editor)  # every setting is documented, or this fails
    assert "arXiv" in find_editor(editor).__doc__
    assert len(about["summary"]) > 20
    assert set(about["settings"]) == set(find_editor(editor).Config.model_fields)


def test_every_preset_is_a_configuration(editor):
    Config = find_editor(editor).Config
    for preset in Config.presets:
        assert isinstance(configured(f"{editor}:{preset}", {})[1], Config)


def test_edits_without_a_subject_are_refused_by_row_where_one_is_needed(bundled, editor):
    if not find_editor(editor).Config.needs_subject:
        pytest.skip("it asks for none")
    rows = [dict(row) for row in ROWS]
    del rows[2]["subject"]
    with pytest.raises(EditsError, match="row 3 has no subject"):
        run(bundled, editor, rows=rows)
    rows[2]["subject"] = "sun"
    with pytest.raises(EditsError, match="row 3: the subject 'sun' is 0 times in the prompt"):
        run(bundled, editor, rows=rows)


def test_a_misspelt_setting_is_named_with_the_nearest(bundled):
    with pytest.raises(ConfigError, match=r"this editor has no setting 'epoch' \(did you mean 'epochs'\?\)"):
        edit(bundled.model, bundled.tokenizer, ROWS, energy=0, epoch=3)
    with pytest.raises(ConfigError, match="epochs is 0"):
        edit(bundled.model, bundled.tokenizer, ROWS, energy=0, epochs=0)


def test_an_unknown_editor_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"there is no editor 'crispedt'.*did you mean 'crispedit'"):
        find_editor("crispedt")


def test_an_energy_needs_a_curvature(bundled):
    with pytest.raises(ConfigError, match="needs a curvature"):
        edit(bundled.model, bundled.tokenizer, ROWS, energy=0.8)


def test_with_energy_zero_it_is_plain_fine_tuning(bundled):
    """The same steps as torch's Adam on the same losses, written plainly."""
    from crispedit.edits import edits_from_rows
    from crispedit.models import edit_matrices
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
    other = load_model("bundled")
    curvature = Curvature.estimate(other.model, other.tokenizer, TEXTS, layers=LAYERS)
    one = edit(bundled.model, bundled.tokenizer, ROWS, texts=TEXTS, layers=LAYERS, epochs=1)
    two = edit(other.model, other.tokenizer, ROWS, curvature=curvature, epochs=1)
    assert all(torch.equal(one.delta[name], two.delta[name]) for name in one.delta)
