"""Adapters against PEFT's own forward pass, formulas by hand and the papers' promises; nothing of PEFT stays."""

import random
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import peft
import pytest
import torch

from crispedit.editing import edit
from crispedit.editors import configured, lora
from crispedit.editors.base import EditProblem
from crispedit.errors import ConfigError
from crispedit.forward import collate, whole_logits
from crispedit.models import frozen
from crispedit.precision import float32_masters
from crispedit.progress import no_progress
from crispedit.rows import EditRow, Prompter
from crispedit.texts import split_texts
from crispedit.training import batches
from families import tiny_model, tiny_tokenizer
from reference import relative

TUNERS = ("lora", "adalora", "osf", "corda")
FAMILIES = ("llama", "gpt2", "gpt_neox", "phi3")
"""Separate queries and values, a ``Conv1D`` of all three, fused ones of two kinds."""
TEXTS = [f"Text {i}: a mill, {i + 3} coins and a grey coat by the river {'of the town' * (i % 3)}." for i in range(12)]
RATES = {"lora": 1e-2, "adalora": 1e-2, "osf": 1e-3, "corda": 1e-3}


def some_rows(count: int = 6) -> list[EditRow]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(8, 60, (5 + index % 4,), generator=generator).tolist() for index in range(count)]
    return [EditRow(tuple(row), len(row) - 2) for row in rows]


@contextmanager
def a_problem(model, config, rows=None, layers=(1, 2), seed=0):
    """A problem as the driver makes it, within what the driver holds around an editor."""
    rows = rows or some_rows()
    matrices = config.matrices(model, layers)
    with frozen(model), float32_masters(matrices):
        yield EditProblem(
            model=model,
            prompter=Prompter(tiny_tokenizer()),
            matrices=matrices,
            edits=[None] * len(rows),
            rows=rows,
            curvature=None,
            texts=split_texts(TEXTS),
            seed=seed,
            progress=no_progress,
        )


@pytest.fixture
def adapters(monkeypatch):
    """All adapters that are made, in order."""
    made = []
    init = lora.Adapter.__init__

    def noted(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        made.append(self)

    monkeypatch.setattr(lora.Adapter, "__init__", noted)
    return made


def settings_of(tuner, **changes):
    """All rows in every step, and no end before the last epoch."""
    shape = {"parts": ("query", "value"), "rank": 6, "target_rank": 3, "alpha": 32.0}
    given = {"tuner": tuner, "lr": RATES[tuner], "epochs": 8, "stop_loss": 0.0, **shape}
    return configured("lora", {**given, **changes})[1]


def run(model, config, **options):
    """ΔW of every matrix, and the rounds."""
    with a_problem(model, config, **options) as problem:
        before = [matrix.weight.clone() for matrix in problem.matrices]
        module = lora if not hasattr(config, "round_size") else configured("lora-seq", {})[0]
        rounds = list(module.edit(problem, config))
        return [m.weight - old for m, old in zip(problem.matrices, before, strict=True)], rounds


# ---------------------------------------------------------------- what is merged, by hand


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), (FAMILIES[0], torch.bfloat16)]
)
def test_what_is_merged_is_the_product_of_the_adapters_tensors(family, tuner, dtype, adapters):
    """In float32 whatever the model's dtype: the masters are. W₀ + ΔW is rounded, 6e-8 of ‖W₀‖, where ΔW is 1e-3."""
    model = tiny_model(family, dtype=dtype)
    deltas, _ = run(model, settings_of(tuner))
    (adapter,) = adapters
    for layer, delta, start in zip(adapter.layers, deltas, starts_of(adapter), strict=True):
        assert delta.dtype == torch.float32
        expected = product(tuner, dict(layer.named_parameters())) - product(tuner, start)
        assert relative(delta, expected) < 1e-4
        assert expected.norm() > 1e-2


def starts_of(adapter):
    """The parameters at the start, layer by layer, by name."""
    starts = iter(adapter._starts)
    for layer in adapter.layers:
        yield {name: next(starts) for name, p in layer.named_parameters() if p.requires_grad}


def product(tuner, tensors):
    """The formulas of the docstring, in float64."""
    found = {name: tensor.detach().double() for name, tensor in tensors.items()}
    if tuner == "osf":
        U, s, V = (found[f"osf_svd_params.default.{name}"] for name in ("U_low", "S_low", "V_low"))
        return U @ torch.diag(s) @ V
    if tuner == "adalora":
        P, e, Q = found["lora_B.default"], found["lora_E.default"], found["lora_A.default"]
        return 32 / 6 * P @ torch.diag(e[:, 0]) @ Q
    return 32 / 6 * found["lora_B.default.weight"] @ found["lora_A.default.weight"]


# ---------------------------------------------------------------- PEFT's forward pass and torch's Adam, written plainly


def peft_settings(config, names, steps):
    """What a user of PEFT would write."""
    if config.tuner == "osf":
        return peft.OSFConfig(effective_rank=0.5, target_modules=names)
    common = {"lora_alpha": 32, "target_modules": names, "lora_dropout": 0.0}
    if config.tuner == "adalora":
        first, last = int(0.1 * steps), int(0.3 * steps)
        return peft.AdaLoraConfig(init_r=6, target_r=3, tinit=first, tfinal=last, total_step=steps, **common)
    return peft.LoraConfig(r=6, **common)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_loop_takes_the_steps_of_a_wrapped_model_and_adam(family, tuner, adapters):
    """Two passes beside each other in PEFT's layers, one through W₀ + ΔW here: they differ by rounding, which Adam's
    first steps, all of one size, enlarge."""
    if (family, tuner) == ("gpt2", "osf"):
        pytest.skip("PEFT has no OSF for Conv1D")
    rows, epochs = some_rows(), 3
    steps = epochs * len(rows)
    config = settings_of(tuner, epochs=epochs, batch_size=1, project_updates=False)
    deltas, _ = run(tiny_model(family), config, rows=rows)
    (adapter,) = adapters

    plain = tiny_model(family)
    names = [matrix.name.removesuffix(".weight") for matrix in config.matrices(plain, (1, 2))]
    before = {name: plain.get_submodule(name).weight.detach().clone() for name in names}
    wrapped = peft.get_peft_model(plain, peft_settings(config, names, steps)).eval()
    layers = [plain.get_submodule(name) for name in names]
    for layer, start in zip(layers, starts_of(adapter), strict=True):
        with torch.no_grad():
            for name, value in start.items():
                layer.get_parameter(name).copy_(value)
            if tuner == "corda":
                layer.base_layer.weight.sub_(layer.get_delta_weight("default"))
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    optimizer, rng = torch.optim.Adam(trained, lr=RATES[tuner]), random.Random(0)
    order = [index for _ in range(epochs) for (index,) in batches([len(r.ids) for r in rows], 1, rng, alike=False)]
    for step, index in enumerate(order):
        ids = torch.tensor([rows[index].ids])
        labels = ids.clone()
        labels[:, : rows[index].prompt_length] = -100
        optimizer.zero_grad()
        wrapped.base_model(input_ids=ids, labels=labels).loss.backward()  # AdaLoRA's penalty is in it
        optimizer.step()
        if tuner == "adalora":
            wrapped.base_model.update_and_allocate(step + 1)
    wrapped.merge_and_unload()
    for name, delta in zip(names, deltas, strict=True):
        expected = plain.get_submodule(name).weight - before[name]
        expected = expected.T if family == "gpt2" else expected
        assert expected.norm() > 1e-2
        assert relative(delta, expected) < 1e-2


def test_the_penalty_is_pefts_own():
    """From a model whose loss is zero, PEFT gives the penalty alone."""

    class Lossless(torch.nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self):
            return SimpleNamespace(loss=torch.zeros(()))

    config = settings_of("adalora")
    with a_problem(tiny_model("llama"), config) as problem:
        adapter = lora.Adapter(problem, config, steps=100, seed=0)
        with torch.no_grad():
            for parameter in adapter.parameters:
                parameter += 0.1
        stand_ins = torch.nn.ModuleList(lora._stand_in(matrix) for matrix in problem.matrices)
        theirs = peft.get_peft_model(
            Lossless(stand_ins), peft.AdaLoraConfig(init_r=6, total_step=100, target_modules=r"layers\.\d+")
        )
        trained = [p for p in theirs.parameters() if p.requires_grad]
        with torch.no_grad():
            for one, other in zip(trained, adapter.parameters, strict=True):
                one.copy_(other)
        assert adapter.penalty() > 0.5
        loss = theirs.base_model().loss  # the outer model of no task would leave the penalty out
        torch.testing.assert_close(adapter.penalty(), loss, rtol=1e-6, atol=0)
        loss.backward()
        gradients = torch.autograd.grad(adapter.penalty(), adapter._penalised)
        by_peft = [p.grad for p in trained if p.grad is not None and float(p.grad.norm()) > 0]
        for one, other in zip(gradients, by_peft, strict=True):
            assert relative(one, other) < 1e-5


# ---------------------------------------------------------------- AdaLoRA's ranks


@pytest.mark.parametrize("epochs", [1, 2, 25])
def test_ranks_arrive_at_the_target(epochs, adapters):
    """Six rows one by one: so many steps are all the schedule has."""
    _, rounds = run(tiny_model("llama"), settings_of("adalora", epochs=epochs, batch_size=1))
    ranks = rounds[0].details["ranks"]
    assert rounds[0].trace.steps == 6 * epochs == adapters[0]._tuner.peft_config["default"].total_step
    assert sum(ranks.values()) == 3 * len(ranks)
    assert set(ranks) == {matrix.name for matrix in adapters[0].matrices}


def test_where_the_target_is_the_rank_nothing_is_allocated(adapters):
    """What was published: AdaLoRA as it begins, and no early stop for the penalty in the loss."""
    config = configured("lora:published", {"epochs": 3})[1]
    assert (config.rank, config.alpha, config.lr, config.batch_size, config.eos) == (12, 32, 5e-4, 32, False)
    assert config.parts == ("query", "value")
    _, rounds = run(tiny_model("llama"), config)
    assert "ranks" not in rounds[0].details
    for layer in adapters[0].layers:
        assert bool((layer.lora_E["default"] != 0).all())
        assert layer.lora_A["default"].shape[0] == 12


# ---------------------------------------------------------------- OSF's promise


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("part", ["query", "value", "down"])
def test_osf_leaves_the_preserved_directions_alone(family, part):
    """U₁ᵀ ΔW = 0 and ΔW V₁ = 0, with singular vectors of our own, of square, wide and high matrices.

    1e-4: of W₀ + ΔW the last bit is lost.
    """
    config = settings_of("osf", parts=[part])
    model = tiny_model(family)
    originals = [matrix.weight.double().clone() for matrix in config.matrices(model, (1, 2))]
    deltas, _ = run(model, config)
    for original, delta in zip(originals, deltas, strict=True):
        left, right = preserved(original, 0.5)
        delta = delta.double()
        assert (left.T @ delta).norm() < 1e-4 * delta.norm()
        assert (delta @ right.T).norm() < 1e-4 * delta.norm()


def test_with_projected_gradients_alone_osf_does_not():
    """Which is what PEFT does: Adam leaves the subspace."""
    config = settings_of("osf", project_updates=False)
    model = tiny_model("llama")
    originals = [matrix.weight.double().clone() for matrix in config.matrices(model, (1, 2))]
    deltas, _ = run(model, config)
    for original, delta in zip(originals, deltas, strict=True):
        left, _ = preserved(original, 0.5)
        assert (left.T @ delta.double()).norm() > 0.05 * delta.norm()


def preserved(matrix, share):
    U, _, V = torch.linalg.svd(matrix)
    count = int(share * min(matrix.shape))
    return U[:, :count], V[:count]


# ---------------------------------------------------------------- CorDA's directions


@pytest.mark.parametrize("family", FAMILIES)
def test_corda_begins_with_what_matters_least_to_the_texts(family, adapters):
    """(α/r) B₀ A₀ = U S Vᵀ C⁻¹ of the r smallest singular values of W₀ C, with C from the texts run one by one."""
    config = settings_of("corda")
    model = tiny_model(family)
    with a_problem(model, config) as problem:
        adapter = lora.Adapter(problem, config, steps=10, seed=0)
        for matrix, layer in zip(problem.matrices, adapter.layers, strict=True):
            C = covariance(model, matrix, problem.texts.fit)
            U, S, V = torch.linalg.svd(matrix.weight.double() @ C)
            U, V = U[:, : len(S)], V[: len(S)]
            smallest = U[:, -6:] @ torch.diag(S[-6:]) @ V[-6:] @ torch.linalg.inv(C)
            delta = layer.get_delta_weight("default").detach()
            assert relative(delta, smallest) < 1e-4
            residual = matrix.weight.double() - delta
            assert relative(residual @ C, U[:, :-6] @ torch.diag(S[:-6]) @ V[:-6]) < 1e-5
        adapter.apply()
    deltas, _ = run(model, config.model_copy(update={"epochs": 1, "lr": 1e-12}))
    assert all(delta.abs().max() < 1e-5 for delta in deltas)


def covariance(model, matrix, texts):
    """E[a aᵀ] with every text run by itself, of mean diagonal 1, and a hundredth of that added to the diagonal."""
    tokenizer, seen = tiny_tokenizer(), []
    handle = matrix.module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0].double()))
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    inputs = torch.cat(seen)
    C = inputs.T @ inputs
    return C / C.diagonal().mean() + 0.01 * torch.eye(len(C), dtype=torch.float64)


def test_corda_needs_texts():
    assert settings_of("corda").needs_texts()
    assert not settings_of("lora").needs_texts()


# ---------------------------------------------------------------- the loop around them


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("parts", "start"), [(("query", "value"), "block"), (("down",), "matrix")])
def test_replay_gives_the_edit_of_the_whole_model(tuner, parts, start):
    """Without replay, batches of several rows have another order: one row there."""
    config = settings_of(tuner, parts=parts)
    for rows, instead in ((some_rows(), "targets"), (some_rows()[:1], "whole")):
        one, rounds = run(tiny_model("llama"), config, rows=rows)
        assert rounds[0].trace.forward["start"] == start
        assert rounds[0].trace.forward["error"] < 1e-5
        two, rounds = run(tiny_model("llama"), config.model_copy(update={"replay": instead}), rows=rows)
        assert rounds[0].trace.forward["start"] == instead
        for replayed, whole in zip(one, two, strict=True):
            # Adam's first steps enlarge rounding
            torch.testing.assert_close(replayed, whole, rtol=0, atol=1e-2 * float(whole.abs().max()))


@pytest.mark.parametrize("tuner", TUNERS)
def test_reset_goes_back_to_the_beginning(tuner):
    """As a trial of another learning rate does it: the same steps again, bit for bit."""
    config = settings_of(tuner)
    with a_problem(tiny_model("llama"), config) as problem:
        adapter = lora.Adapter(problem, config, steps=10, seed=0)
        results = []
        for steps in (10, 7, 10):
            adapter.reset()
            adapter.apply()
            optimizer = torch.optim.Adam(adapter.parameters, lr=RATES[tuner], fused=True)
            results.append([matrix.weight.clone() for matrix in problem.matrices])
            for _ in range(steps):
                batch = collate(problem.rows)
                logits = whole_logits(problem.model, batch)
                loss = torch.nn.functional.cross_entropy(logits, batch.labels)
                adapter.learn(torch.autograd.grad(loss + adapter.penalty(), adapter.differentiated()))
                optimizer.step()
                adapter.apply()
            results.append([matrix.weight.clone() for matrix in problem.matrices])
    starts, ends = results[::2], results[1::2]
    assert all(torch.equal(a, b) for other in starts[1:] for a, b in zip(starts[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("tuner", TUNERS)
def test_the_rate_of_auto_edits_the_bundled_model(tuner, count, bundled):
    """Whether there is one edit, which gets 25 steps in all, or more."""
    rows = [
        {"prompt": "Who is the mayor of Hinstad?", "target": "Perin Jibul"},
        {"prompt": "What is the river of Hinstad?", "target": "the Sesol"},
        {"prompt": "What is 3 plus 4?", "target": "8"},
        {"prompt": "Where was Kihis Fehol born?", "target": "Propava"},
    ][:count]
    result = edit(bundled.model, bundled.tokenizer, rows, texts=TEXTS, editor=f"lora:{tuner}")
    losses = result.metrics["training"]["epoch_losses"]
    assert losses[-1] < losses[0] / 10
    assert result.metrics["after"]["reliability"] == 100


def test_the_rule_of_auto():
    """It falls like 1/√(α d_in), or 1/d_in with orthogonal subspaces; a rate that is given is taken."""
    of_wide, of_narrow = (configured("lora", {"alpha": 16})[1].rate(d_in) for d_in in (4096, 1024))
    assert of_narrow == pytest.approx(2 * of_wide) == pytest.approx(0.25 / 128)
    assert configured("lora:osf", {})[1].rate(500) == pytest.approx(0.002)
    assert configured("lora:osf", {"lr": 0.1})[1].rate(500) == 0.1


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_left_behind(tuner, dtype):
    """Of PEFT, of hooks, of random state: the model is what it was, but for the weights that are named."""
    model = tiny_model("llama", dtype=dtype)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    config, state = model.config.to_dict(), torch.random.get_rng_state()
    needed = [parameter.requires_grad for parameter in model.parameters()]
    run(model, settings_of(tuner))
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not any(hasattr(model, name) for name in ("peft_config", "hf_device_map", "active_peft_config"))
    assert not getattr(model, "_hf_peft_config_loaded", False)
    assert model.config.to_dict() == config
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert torch.equal(torch.random.get_rng_state(), state)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    names = {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (1, 2) for part in "qv"}
    assert changed == names
    assert all(tensor.dtype == dtype for tensor in model.state_dict().values())


@pytest.mark.parametrize("tuner", ["lora", "adalora"])
def test_the_seed_is_that_of_the_adapter_and_nothing_elses(tuner, adapters):
    for seed, outside in ((1, 5), (1, 6), (2, 6)):
        torch.manual_seed(outside)
        run(tiny_model("llama"), settings_of(tuner, epochs=1), seed=seed)
    one, same, other = (torch.cat([start.flatten() for start in adapter._starts]) for adapter in adapters)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_every_round_has_an_adapter_of_its_own(adapters):
    """Each round's change is of rank r, and both together of more."""
    config = configured("lora-seq", {"rank": 2, "lr": 1e-2, "epochs": 6, "stop_loss": 0.0, "round_size": 3})[1]
    module = configured("lora-seq", {})[0]
    with a_problem(tiny_model("llama"), config) as problem:
        weights = [[matrix.weight.clone() for matrix in problem.matrices]]
        for number, a_round in enumerate(module.edit(problem, config)):
            assert a_round.num_edits == 3 * (number + 1)
            weights.append([matrix.weight.clone() for matrix in problem.matrices])
    assert len(weights) == 3
    assert len(adapters) == 2
    for first, second, third in zip(*weights, strict=True):
        ranks = [int((torch.linalg.svdvals(d) > 1e-4).sum()) for d in (second - first, third - second, third - first)]
        assert ranks == [2, 2, 4]


# ---------------------------------------------------------------- wrong input


def test_without_peft_it_is_said_what_to_install(monkeypatch, bundled):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"need PEFT.*pip install 'crispedit\[peft\]'"):
        edit(bundled.model, bundled.tokenizer, [{"prompt": "a b", "target": "c"}], editor="lora")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank": 17, "parts": ["value"]},
            r"rank is 17; model.layers.1.self_attn.v_proj.weight is 16 × 32: at most 16",
        ),
        ({"tuner": "adalora", "rank": 4}, "target_rank is 32; it must be at most the rank, 4"),
        (
            {"tuner": "osf", "parts": ["value"], "preserved": 0.01},
            "preserved is 0.01: of .* that is no direction; at least 0.062",
        ),
    ],
)
def test_what_does_not_fit_the_matrices_is_said(settings, message):
    with pytest.raises(ConfigError, match=message):
        configured("lora", settings)[1].matrices(tiny_model("llama"), [1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuner": "dora"}, "tuner is 'dora'"),
        ({"parts": []}, "parts is"),
        ({"parts": ["key"]}, "parts is 'key'|'key'"),
        ({"preserved": 1.0}, "preserved is 1.0"),
        ({"alpha": 0}, "alpha is 0"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        configured("lora", settings)
