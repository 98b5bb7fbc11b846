"""MEMIT, and what it shares with AlphaEdit: subjects, contexts, value vectors, the closed form, rounds."""

from dataclasses import replace

import pytest
import torch

from builders import curvature_of
from crispedit.editing import edit
from crispedit.editors import _values
from crispedit.editors._activations import at_last_tokens
from crispedit.editors._locate import closed_form, recall_layers, subject_keys
from crispedit.editors._subjects import asked, last_token, sampled_contexts, subject_row
from crispedit.editors._values import ValueConfig, find_values
from crispedit.editors.base import EditProblem
from crispedit.editors.memit import Config, InverseMoment
from crispedit.editors.memit import edit as memit
from crispedit.edits import Edit
from crispedit.errors import EditsError, ModelError, NumericsError
from crispedit.factors import Factors
from crispedit.models import decoder_blocks, edit_matrices, frozen
from crispedit.moments import Sketch
from crispedit.precision import float32_masters
from crispedit.progress import no_progress
from crispedit.rows import Prompter
from families import CHATML, LLAMA_3, tiny_model, tiny_tokenizer
from reference import relative

EDITS = [
    Edit(prompt="Who is the mayor of Rome?", target="Bo", subject="Rome", row=1),
    Edit(prompt="Rome lies on the", target="Po", subject="Rome", row=2),
    Edit(prompt="The river of Old Town is", target="Ob", subject="Old Town", row=3),
    Edit(prompt="Say: what does Al do", target="No one", subject="Al", row=4),
]
CONTEXTS = ("", "The cat sat. ", "I go there now. ")


def prompter_for(**options) -> Prompter:
    eos = options.pop("ends_with_eos", False)
    return Prompter(tiny_tokenizer(**options), eos=eos)


def token_at(prompter, row):
    return prompter.tokenizer.decode([row.row.ids[row.subject]])


# ---------------------------------------------------------------- subjects

MERGES = (("T", "o"), ("e", "?"), ("l", "Ġ"), ("To", "w"))


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("template", [None, CHATML, LLAMA_3])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("index", "token"),
    [(0, "e?"), (1, "e"), (2, "n"), (3, "l ")],  # a token may hold what follows the subject too
)
def test_the_subjects_last_token_is_found(begins, template, context, index, token):
    prompter = prompter_for(begins=begins, merges=MERGES, chat_template=template)
    row = subject_row(prompter, EDITS[index], context)
    assert token_at(prompter, row) == token
    before = prompter.tokenizer.decode(row.row.ids[: row.subject + 1])
    assert before.rstrip("? ").endswith(EDITS[index].subject)
    # the occurrence in the user's text, and not one in the context
    assert context + EDITS[index].prompt in prompter.tokenizer.decode(row.row.ids)


def test_a_subject_in_the_context_too_is_not_mistaken():
    prompter = prompter_for()
    row = subject_row(prompter, EDITS[0], "Rome is old. ")
    assert prompter.tokenizer.decode(row.until_subject).endswith("mayor of Rome")


def test_a_subject_that_overlaps_itself_is_the_one_that_was_counted():
    prompter = prompter_for()
    edit = Edit(prompt="banana is", target="x", subject="ana")
    assert prompter.tokenizer.decode(subject_row(prompter, edit).until_subject).endswith("bana")


def test_a_subject_whose_end_merges_with_the_target_is_taken_up_to_there():
    prompter = prompter_for(merges=(("Ġ", "B"), ("e", "ĠB")))
    edit = Edit(prompt="I love Rome", target="Bo", subject="Rome")
    row = subject_row(prompter, edit)
    assert prompter.tokenizer.decode(row.row.ids[row.row.prompt_length :]) == "e Bo"
    assert prompter.tokenizer.decode(row.until_subject).endswith("Rom")


def test_templates_that_strip_the_users_text_do_not_shift_it():
    prompter = prompter_for(chat_template=LLAMA_3)
    edit = Edit(prompt="  Rome lies on the ", target="Po", subject="Rome")
    assert prompter.tokenizer.decode(subject_row(prompter, edit).until_subject).endswith("Rome")


def test_in_a_conversation_the_subject_is_in_the_last_message_of_the_user():
    prompter = prompter_for(chat_template=CHATML)
    turns = (("user", "Is Rome old?"), ("assistant", "Yes"), ("user", "Who is the mayor of Rome?"))
    row = subject_row(prompter, replace(EDITS[0], turns=turns), "The cat sat. ")
    said = prompter.tokenizer.decode(row.until_subject)
    assert said.endswith("The cat sat. Who is the mayor of Rome")
    assert "Is Rome old?" in said


def test_a_template_that_rewrites_the_prompt_is_refused_by_row_number():
    template = "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}"
    with pytest.raises(EditsError, match="row 2: the chat template changes the prompt"):
        subject_row(prompter_for(chat_template=template), EDITS[1])


class _Slow:
    """A tokenizer that knows no offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, add_special_tokens=True):
        return self._tokenizer(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.prompt)
@pytest.mark.parametrize("merges", [(), MERGES, (("a", "y"), ("m", "e"), ("me", "?"), ("e", "?"))])
def test_without_offsets_the_same_token_is_found(begins, edit, merges):
    fast = prompter_for(begins=begins, merges=merges)
    slow = Prompter(_Slow(fast.tokenizer), eos=False)
    for context in CONTEXTS:
        text = f"{context}{edit.prompt} {edit.target}"
        end = len(context) + edit.prompt.index(edit.subject) + len(edit.subject)
        assert last_token(slow, text, end) == last_token(fast, text, end)


def test_contexts_are_the_models_own_and_always_the_same(bundled):
    prompter = Prompter.of(bundled.model, bundled.tokenizer)
    state = torch.random.get_rng_state()
    one = sampled_contexts(bundled.model, prompter, 7, seed=3)
    torch.manual_seed(9)
    assert one == sampled_contexts(bundled.model, prompter, 7, seed=3)
    assert one != sampled_contexts(bundled.model, prompter, 7, seed=4)
    torch.random.set_rng_state(state)
    assert one[0] == ""
    assert len(set(one)) == 8  # the seventh begins as the second does
    for context, start in zip(one[1:], ("The", "Therefore", "Because", "I", "You", "The"), strict=False):
        assert context.startswith(start)
        assert context.endswith(". ")
        assert "\n" not in context


# ---------------------------------------------------------------- value vectors


def value_by_loop(model, prompter, edit, layer, config, contexts=CONTEXTS):
    """One edit, one row after the other, the whole model, torch's Adam: section 3.1 of ROME as it stands."""
    rows = [subject_row(prompter, edit, context) for context in contexts]
    essence = prompter.tokenizer(f"{edit.subject} is a")["input_ids"]
    said = [prompter.tokenizer.decode(essence[: i + 1]) for i in range(len(essence))]
    read_at = next(i for i, text in enumerate(said) if text.endswith(edit.subject))
    block = decoder_blocks(model)[1][layer]
    state = {}

    def hook(_, __, output):
        output = output.clone()
        if "h" not in state:
            state["h"] = output[0, state["at"]].detach().clone()
            state["delta"] = torch.zeros_like(state["h"], requires_grad=True)
        output[0, state["at"]] = output[0, state["at"]] + state["delta"]
        return output

    def log_p(ids, at):
        state["at"] = at
        return model(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(-1)

    optimizer = first = None
    losses = []
    handle = block.register_forward_hook(hook)
    try:
        for step in range(config.steps):
            likelihoods = []
            for row in rows:
                said = log_p(row.row.ids, row.subject)
                targets = range(row.row.prompt_length, len(row.row.ids))
                likelihoods.append(-sum(said[t - 1, row.row.ids[t]] for t in targets) / len(targets))
            now = log_p(essence, read_at)[read_at]
            first = now.detach() if first is None else first
            kl = torch.nn.functional.kl_div(first[None], now[None], log_target=True, reduction="batchmean")
            delta, h = state["delta"], state["h"]
            loss = sum(likelihoods) / len(rows) + config.kl * kl + config.weight_decay * delta.norm() / h.norm() ** 2
            losses.append(float(loss.detach()))
            if loss < config.value_loss or step == config.steps - 1:
                break
            rate = _values.RATE * float(h.norm()) / len(h) ** 0.5 if config.lr == "auto" else config.lr
            optimizer = optimizer or torch.optim.Adam([delta], lr=rate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                if delta.norm() > config.clamp * h.norm():
                    delta.mul_(config.clamp * h.norm() / delta.norm())
    finally:
        handle.remove()
    return (state["h"] + state["delta"]).detach(), losses


SETTINGS = {
    "default": ValueConfig(steps=12),
    "clamped": ValueConfig(steps=8, lr=0.5, clamp=0.3),
    "stops": ValueConfig(steps=12, lr=0.5, clamp=4, weight_decay=1e-3, kl=1, value_loss=0),
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("layer", [0, 2])
def test_values_are_those_of_one_edit_at_a_time(family, layer, settings):
    """In float64, so that Adam, whose steps go by signs, has no rounding to enlarge."""
    config = SETTINGS[settings]
    model = tiny_model(family, dtype=torch.float64)
    prompter = prompter_for()
    with frozen(model):
        rows = asked(model, prompter, EDITS, CONTEXTS)
        if settings == "stops":  # where about half of the edits have stopped by the sixth step
            losses = find_values(model, layer, rows, config, no_progress).losses
            config = config.model_copy(update={"value_loss": float(losses[:, :6].min(1).values.median()) + 1e-6})
        found = find_values(model, layer, rows, config, no_progress)
        for index, edit in enumerate(EDITS):
            expected, losses = value_by_loop(model, prompter, edit, layer, config)
            assert (found.wanted[index] - expected).norm() < 1e-7 * expected.norm()
            length = len(losses)
            assert found.losses[index, :length].tolist() == pytest.approx(losses, rel=1e-8)
            assert (found.losses[index, length:] == found.losses[index, length - 1]).all()
    if settings == "stops":
        below = found.losses < config.value_loss
        assert below[:, 5].any()
        assert not below[:, 5].all()
    if settings == "clamped":
        moved = (found.wanted - found.before).norm(dim=1) / found.before.norm(dim=1)
        assert moved.max() == pytest.approx(0.3)


@pytest.mark.parametrize("together", [1, 3])
def test_what_goes_through_the_model_together_makes_no_difference(together):
    """To rounding: a first step of Adam is the sign of a gradient, so a coordinate whose gradient is next to nothing
    may go the other way; in float32 on the whole vector that is less than a per mille."""
    model, prompter = tiny_model("llama"), prompter_for()
    config = ValueConfig(steps=10)
    with frozen(model):
        edits = asked(model, prompter, EDITS, CONTEXTS)
        every = find_values(model, 1, edits, config, no_progress)
        apart = find_values(model, 1, edits, config.model_copy(update={"batch_size": together}), no_progress)
    assert relative(every.wanted - every.before, apart.wanted - apart.before) < 1e-3


def test_a_model_of_which_nothing_can_be_left_out_is_run_whole(monkeypatch, caplog):
    model, prompter = tiny_model("llama", dtype=torch.float64), prompter_for()
    with frozen(model):
        edits = asked(model, prompter, EDITS, CONTEXTS)
        expected = find_values(model, 2, edits, ValueConfig(steps=6), no_progress)
        monkeypatch.setattr(_values, "DynamicCache", _broken)
        with caplog.at_level("INFO", logger="crispedit"):
            found = find_values(model, 2, edits, ValueConfig(steps=6), no_progress)
    assert "the whole model is run" in caplog.text
    assert relative(found.wanted, expected.wanted) < 1e-10


def _broken(*_):
    raise RuntimeError("not this model")


def test_values_are_for_the_end_of_sequence_too_where_targets_have_one():
    prompter = prompter_for(ends_with_eos=True)
    rows = subject_row(prompter, EDITS[0]).row
    assert rows.ids[-1] == prompter.tokenizer.eos_token_id
    assert rows.num_targets == subject_row(prompter_for(), EDITS[0]).row.num_targets + 1


def test_a_rate_that_leads_to_no_number_is_an_error():
    model, prompter = tiny_model("llama"), prompter_for()
    with frozen(model), pytest.raises(NumericsError, match="lower --lr"):
        find_values(model, 1, asked(model, prompter, EDITS, CONTEXTS), ValueConfig(lr=1e30), no_progress)


# ---------------------------------------------------------------- the closed form


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size=24, count=60, seed=1):
    samples = random(size, count, seed=seed)
    return (samples @ samples.T / count).float()


CPU = torch.device("cpu")


@pytest.mark.parametrize("earlier", [0, 5])
def test_the_closed_form_is_the_published_one(earlier):
    C, K, R, K_p = moment(), random(24, 7, seed=2), random(10, 7, seed=3), random(24, earlier, seed=4)
    found = closed_form(K, R, InverseMoment(C, 3.0, CPU), K_p)
    expected = R @ K.T @ torch.linalg.inv(3.0 * C.double() + K_p @ K_p.T + K @ K.T)
    assert relative(found, expected) < 1e-5  # C is lifted by 1e-7 of ‖C‖, and has a condition of about 20


def test_the_closed_form_solves_its_normal_equations():
    """The gradient of ‖ΔW K − R‖² + λ tr(ΔW C ΔWᵀ) vanishes."""
    C, K, R = moment(), random(24, 7, seed=2), random(10, 7, seed=3)
    freedom = InverseMoment(C, 3.0, CPU)
    change = closed_form(K, R, freedom).requires_grad_()
    lifted = torch.linalg.inv(freedom.times(torch.eye(24, dtype=torch.float64)))
    value = (change @ K - R).square().sum() + 3.0 * torch.trace(change @ lifted @ change.T)
    (gradient,) = torch.autograd.grad(value, change)
    assert gradient.norm() < 1e-10 * R.norm()


def test_with_no_weight_on_the_past_it_interpolates():
    K, R = random(24, 7, seed=2), random(10, 7, seed=3)
    change = closed_form(K, R, InverseMoment(moment(), 1e-9, CPU))
    assert relative(change @ K, R) < 1e-8


def test_two_edits_of_one_key_meet_in_the_middle():
    key, wanted = random(24, 1, seed=2), random(10, 2, seed=3)
    keys = key.expand(-1, 2).contiguous()
    change = closed_form(keys, wanted, InverseMoment(moment(), 1e-18, CPU))
    assert relative(change @ key, wanted.mean(1, keepdim=True)) < 1e-6


def test_a_moment_of_too_few_tokens_is_lifted_and_not_inverted_to_noise():
    C = moment(count=6)  # of rank 6
    K, R = random(24, 7, seed=2), random(10, 7, seed=3)
    change = closed_form(K, R, InverseMoment(C, 15000.0, CPU))
    assert torch.isfinite(change).all()
    assert change.norm() < 10 * (R @ torch.linalg.pinv(K)).norm()


def test_a_sketch_stands_for_what_it_knows_and_the_mean_of_the_rest():
    factor = 10 * random(24, 5, seed=5)
    C = factor @ factor.T + 0.5 * torch.eye(24)
    K, R = random(24, 7, seed=2), random(10, 7, seed=3)
    exact, sketched = (InverseMoment(M, 3.0, CPU) for M in (C.float(), Sketch.of(C.float(), rank=12)))
    pairs = Sketch.of(C.float(), rank=12).eigenpairs
    U, rest = pairs.vectors.double(), (pairs.trace - float(pairs.values.sum())) / 12
    stands_for = U @ torch.diag(pairs.values - rest) @ U.T + rest * torch.eye(24)
    assert relative(sketched.times(K), torch.linalg.solve(stands_for, K)) < 1e-4  # eigenvectors in float32
    # and of eigenvalues of some hundreds and 0.5 that does about what the moment itself does
    assert relative(closed_form(K, R, sketched) @ K, closed_form(K, R, exact) @ K) < 0.2


# ---------------------------------------------------------------- the editor


def problem_for(model, prompter, edits=EDITS, layers=(1, 2), moments=None, **changes):
    matrices = edit_matrices(model, layers)
    factors = {
        m.name: Factors(A=moment(m.shape[1], 100, seed=i), G=torch.eye(m.shape[0]), num_tokens=100)
        for i, m in enumerate(matrices)
    }
    return EditProblem(
        model=model,
        prompter=prompter,
        matrices=matrices,
        edits=edits,
        rows=prompter.rows(edits),
        curvature=curvature_of(moments or factors, layers=tuple(layers)),
        seed=0,
        progress=no_progress,
        **changes,
    )


def run(problem, config, editor=memit):
    with frozen(problem.model), float32_masters(problem.matrices):
        return list(editor(problem, config))


def keys_by_loop(model, matrix, rows_of_edits):
    """Section 4 of MEMIT: the bare prompt's key and the mean of the others', half and half."""
    seen = []
    handle = matrix.module.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    keys = []
    with torch.no_grad():
        for rows in rows_of_edits:
            found = []
            for row in rows:
                model(input_ids=torch.tensor([list(row.row.ids)]))
                found.append(seen.pop()[row.subject])
            keys.append(0.5 * found[0] + 0.5 * torch.stack(found[1:]).mean(0))
    handle.remove()
    return torch.stack(keys, 1).double()


def outputs_by_loop(model, layer, rows):
    found = []
    for row in rows:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([list(row.row.ids)]), output_hidden_states=True).hidden_states
        found.append(states[layer + 1][0, row.subject])
    return torch.stack(found, 1).double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_it_is_the_published_algorithm_written_plainly(family):
    """Values are those of the search; the rest is done edit by edit, row by row, with an inverse."""
    prompter = prompter_for()
    model, plain = tiny_model(family), tiny_model(family)
    config = Config(mom2_weight=20.0, contexts=2, steps=6)
    problem = problem_for(model, prompter)
    before = {m.name: m.weight.clone() for m in problem.matrices}
    run(problem, config)

    contexts = sampled_contexts(plain, prompter, 2, seed=0)
    with frozen(plain):
        values = find_values(plain, 2, asked(plain, prompter, EDITS, contexts), config, no_progress)
    rows = [[subject_row(prompter, edit, context) for context in contexts] for edit in EDITS]
    for number, matrix in enumerate(edit_matrices(plain, (1, 2))):
        K = keys_by_loop(plain, matrix, rows)
        R = (values.wanted.T.double() - outputs_by_loop(plain, 2, [of_edit[0] for of_edit in rows])) / (2 - number)
        C = problem.curvature.factors[matrix.name].A.double()
        expected = R @ K.T @ torch.linalg.inv(20.0 * C + K @ K.T)
        with torch.no_grad():
            matrix.weight.add_(expected.float())
        change = problem.matrices[number].weight - before[matrix.name]
        # C is lifted by 1e-7 of its norm, and weights are rounded in float32
        assert relative(change, expected) < 1e-3


def test_keys_are_found_in_batches_as_one_by_one():
    model, prompter = tiny_model("llama"), prompter_for()
    matrix = edit_matrices(model, (2,))[0]
    with frozen(model):
        found = subject_keys(model, matrix, asked(model, prompter, EDITS, CONTEXTS))
    rows = [[subject_row(prompter, edit, context) for context in CONTEXTS] for edit in EDITS]
    assert relative(found.T, keys_by_loop(model, matrix, rows)) < 1e-5


def test_rounds_with_memory_keep_what_earlier_keys_give():
    def kept(memory):
        model, prompter = tiny_model("llama"), prompter_for()
        config = Config(mom2_weight=1e-4, contexts=0, steps=6, round_size=2, memory=memory)
        problem = problem_for(model, prompter, layers=(2,))
        before = problem.matrices[0].weight.clone()
        after = []
        with frozen(model), float32_masters(problem.matrices):
            for _ in memit(problem, config):
                after.append(problem.matrices[0].weight - before)
            keys = subject_keys(model, problem.matrices[0], asked(model, prompter, EDITS[:2], ("",)))
        return relative(after[1] @ keys.T, after[0] @ keys.T)

    assert kept(memory=True) < 0.02
    assert kept(memory=False) > 0.1


def test_with_little_weight_on_the_past_values_are_brought_about():
    model, prompter = tiny_model("llama"), prompter_for()
    rounds = run(problem_for(model, prompter, layers=(2,)), Config(mom2_weight=1e-6, contexts=0, steps=6))
    assert rounds[0].num_edits == 4
    assert rounds[0].details["value_missed"] < 1e-3
    assert rounds[0].trace.epoch_losses[-1] < rounds[0].trace.epoch_losses[0]
    assert len(rounds[0].trace.epoch_losses) == 6


def test_it_edits_in_bfloat16_as_in_float32():
    changes = []
    for dtype in (torch.float32, torch.bfloat16):
        model, prompter = tiny_model("llama", dtype=dtype), prompter_for()
        problem = problem_for(model, prompter)
        before = {m.name: m.weight.float().clone() for m in problem.matrices}
        with frozen(model), float32_masters(problem.matrices):
            list(memit(problem, Config(mom2_weight=20.0, contexts=0, steps=6)))
            changes.append([m.weight - before[m.name] for m in problem.matrices])
    for exact, rounded in zip(*changes, strict=True):
        assert relative(rounded, exact) < 0.3  # bfloat16 has 8 bits, and Adam's first steps are signs


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_a_model_with_a_norm_behind_the_matrix_is_refused(family):
    model, prompter = tiny_model(family), prompter_for()
    # a norm whose weight is not a constant is no factor
    for name, parameter in model.named_parameters():
        if "post_feedforward_layernorm" in name:
            parameter.data.add_(torch.linspace(0, 1, len(parameter)))
    with pytest.raises(ModelError, match="a norm follows it"):
        run(problem_for(model, prompter), Config(contexts=0, steps=2))


def test_edits_without_a_subject_are_refused_by_row_number(bundled):
    rows = [{"prompt": "Where is Rome?", "target": "here", "subject": "Rome"}, {"prompt": "What?", "target": "that"}]
    with pytest.raises(EditsError, match="row 2 has no subject"):
        edit(bundled.model, bundled.tokenizer, rows, texts=["a", "b"], editor="memit")
    rows[1] |= {"subject": "Paris"}
    with pytest.raises(EditsError, match="row 2: the subject 'Paris' is 0 times in the prompt"):
        edit(bundled.model, bundled.tokenizer, rows, texts=["a", "b"], editor="memit")


@pytest.mark.parametrize(("blocks", "layers"), [(1, (0,)), (8, (0, 1, 2)), (32, (4, 5, 6, 7, 8))])
def test_the_layers_are_the_published_ones_where_there_are_32(blocks, layers):
    assert recall_layers(blocks) == layers


def test_activations_come_back_in_the_order_of_the_rows():
    model = tiny_model("llama")
    rows = [[5, 6, 7, 8], [9], [3, 4]]
    found = at_last_tokens(model, 1, rows)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for row, one in zip(rows, found, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[2][0, -1]
        assert torch.allclose(one, expected, atol=1e-5)
