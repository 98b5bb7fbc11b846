"""MEND: its hypernetwork and the gradient of its training against dense weights, autograd and finite differences.

In float64 a central difference with a step of 1e-6 is off by 1e-15 / 1e-6 (rounding) of losses of the order of 10. It
is taken on GPT-2: a Llama's norms and its eager softmax compute in float32, whatever its weights are, and how they
round depends on the CPU. Where two ways to the same number are to agree to 1e-9, its norms and softmax are in float64.
"""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from crispedit.cli import _run
from crispedit.edit_job import EditJob
from crispedit.editing import edit
from crispedit.editors._capture import capture
from crispedit.editors._hypernetwork import Hypernetwork, applied
from crispedit.editors._meta import Lesson, Meta, MetaSettings, lessons, train_hypernetwork
from crispedit.editors.mend import Config
from crispedit.edits import Edit, Locality
from crispedit.errors import ConfigError
from crispedit.forward import collate, target_logits
from crispedit.models import edit_matrices, fingerprint, frozen, load_model
from crispedit.rows import EditRow, Prompter
from crispedit.texts import split_texts
from families import tiny_model, tiny_tokenizer
from reference import random_rows, relative, run_with_offset, tiny_gpt2, tiny_llama

SETTINGS = MetaSettings(
    rank=5,
    step_size=0.02,
    lr=1e-3,
    step_size_lr=0.05,
    edit_weight=0.5,
    locality_weight=1.0,
    clip=100.0,
    steps=6,
    edits_per_step=3,
    edits_per_update=1,
    seed=0,
)
FAST = {"steps": 3, "edits_per_step": 4, "edits_per_update": 1, "rank": 4}
PARTS = ("gate", "up", "down")


def exact_llama():
    """The tiny Llama with nothing in it that computes in float32."""
    model = tiny_llama(torch.float64)
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(rms_norm, weight=module.weight, eps=module.variance_epsilon)
    return model


def rms_norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rows_of(lengths, targets, seed=0) -> list[EditRow]:
    pairs = zip(random_rows(lengths, seed), targets, strict=True)
    return [EditRow(tuple(ids), len(ids) - count) for ids, count in pairs]


def some_lessons(count=4) -> list[Lesson]:
    taught = rows_of([5 + i % 4 for i in range(count)], [1 + i % 3 for i in range(count)], seed=1)
    asked = rows_of([6 + i % 3 for i in range(count)], [1 + i % 3 for i in range(count)], seed=2)
    kept = rows_of([4 + i % 5 for i in range(count)], [1 + i % 2 for i in range(count)], seed=3)
    return [Lesson(row=r, asked=(a,), kept=(k,)) for r, a, k in zip(taught, asked, kept, strict=True)]


def stirred(network: Hypernetwork, seed=7) -> Hypernetwork:
    """A network that does something: nothing in it is zero, and it is not linear where it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "step_sizes":
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    return network


def meta_of(model, settings=SETTINGS, count=4) -> Meta:
    """In the model's dtype."""
    meta = Meta(model, edit_matrices(model, [0, 1], PARTS), some_lessons(count), settings)
    meta.fit_moments(lambda *_: None)
    meta.network.to(model.dtype)
    return meta


def dense_losses(meta: Meta, taught, together=1, scored=None):
    """The same losses, one row at a time: pairs from a loop, W' as a dense matrix, torch's functional_call."""
    model, network, matrices = meta.model, meta.network, meta.matrices
    edit_losses, divergences = [], []
    for first in range(0, len(taught), together):
        group = taught[first : first + together]
        weights = {}
        for index, matrix in enumerate(matrices):
            shape = matrix.shape
            module = network.networks[f"{shape[0]}x{shape[1]}"]
            delta = 0
            for lesson in group:
                row = lesson.row
                logits, a, offset = run_with_offset(model, matrix, row.ids)
                at = range(row.prompt_length - 1, len(row.ids) - 1)
                (g,) = torch.autograd.grad(sum(-logits[t].log_softmax(-1)[row.ids[t + 1]] for t in at), offset)
                for token in range(len(row.ids) - 1):
                    if g[token].abs().sum() == 0:
                        continue
                    z = (torch.cat([a[token], g[token]]) - module.mean) / module.std
                    for layer in module.layers:
                        inner = layer.scale[network.member[index]] * (layer.U @ (layer.V @ z) + layer.bias)
                        z = z + torch.relu(inner + layer.shift[network.member[index]])
                    delta = delta - network.step_sizes[index] * torch.outer(z[shape[1] :], z[: shape[1]])
            weights[matrix.name] = matrix.weight + delta
        for lesson in group if scored is None else [taught[index] for index in scored]:
            for row, is_kept in ((lesson.asked[0], False), (lesson.kept[0], True)):
                ids = torch.tensor([row.ids])
                after = functional_call(model, weights, (ids,)).logits[0, row.prompt_length - 1 : -1].log_softmax(-1)
                if is_kept:
                    base = model(ids).logits[0, row.prompt_length - 1 : -1].log_softmax(-1).detach()
                    divergences += [(p.exp() * (p - q)).sum() for p, q in zip(base, after, strict=True)]
                else:
                    labels = row.ids[row.prompt_length :]
                    edit_losses += [-q[label] for q, label in zip(after, labels, strict=True)]
    return torch.stack(edit_losses).mean(), torch.stack(divergences).mean()


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_it_begins_as_gradient_descent_with_normalised_factors(build):
    meta = meta_of(build())
    rows = [lesson.row for lesson in meta.taught]
    factors = capture(meta.model, meta.matrices, rows, tokens="all").factors
    for index, matrix in enumerate(meta.matrices):
        module = meta.network.networks["x".join(map(str, matrix.shape))]
        used = factors[matrix.name].gradients.abs().sum(1) > 0
        z = (factors[matrix.name].joined[used] - module.mean) / module.std
        h, g = z[:, : matrix.shape[1]], z[:, matrix.shape[1] :]
        assert relative(meta.network.update(index, factors[matrix.name]).delta().detach(), -0.02 * g.T @ h) < 1e-5


def test_its_statistics_are_those_of_all_train_edits():
    meta = meta_of(exact_llama())
    gates = [i for i, m in enumerate(meta.matrices) if m.shape == (48, 32)]
    pairs = capture(meta.model, meta.matrices, [lesson.row for lesson in meta.taught], tokens="all").factors
    joined = torch.cat([pairs[meta.matrices[i].name].joined for i in gates])
    joined = joined[(joined[:, :32] != 0).any(1) & (joined[:, 32:] != 0).any(1)]
    variance, mean = torch.var_mean(joined, dim=0)
    network = meta.network.networks["48x32"]
    assert torch.allclose(network.mean, mean, atol=1e-6)  # kept in float32
    assert torch.allclose(network.std, variance.sqrt(), rtol=1e-6)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_rows_of_many_edits_meet_each_its_own_dense_weights(build):
    model = exact_llama() if build is tiny_llama else build(torch.float64)
    meta = meta_of(model)
    stirred(meta.network)
    taught = meta.taught
    factors = capture(model, meta.matrices, [lesson.row for lesson in taught], tokens="all").factors
    groups = torch.arange(len(taught))
    updates = [meta.network.update(i, factors[m.name], groups) for i, m in enumerate(meta.matrices)]
    asked = [lesson.asked[0] for lesson in taught]
    batch = collate(asked)
    with torch.no_grad(), applied(meta.matrices, updates, batch, groups):
        together = target_logits(model, batch)
    place = 0
    for number, row in enumerate(asked):
        weights = {}
        for update, matrix in zip(updates, meta.matrices, strict=True):
            own = update.groups == number
            dense = matrix.weight - update.left[own].T @ update.right[own]
            weights[matrix.name] = matrix.as_weight(dense)  # back to the stored layout
        with torch.no_grad():
            alone = functional_call(model, weights, (torch.tensor([row.ids]),)).logits[0, row.prompt_length - 1 : -1]
        assert relative(together[place : place + row.num_targets], alone) < 1e-9
        place += row.num_targets
    assert not any(m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------- the training


@pytest.mark.parametrize("together", [1, 2, 8])
def test_the_losses_and_their_gradient_are_those_of_dense_weights(together):
    meta = meta_of(exact_llama(), count=8)
    stirred(meta.network)
    parameters = list(meta.network.parameters())
    found = meta.losses(meta.taught, random.Random(0), together)
    truth = dense_losses(meta, meta.taught, together)
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    ours = torch.autograd.grad(found[0] + found[1], parameters)
    theirs = torch.autograd.grad(truth[0] + truth[1], parameters)
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine, other) < 1e-8


def test_the_gradient_is_that_of_finite_differences():
    meta = meta_of(tiny_gpt2(torch.float64))
    stirred(meta.network)
    parameters = list(meta.network.parameters())

    def value() -> torch.Tensor:
        edit_loss, divergence = meta.losses(meta.taught, random.Random(0), 1)
        return edit_loss + divergence

    gradients = torch.autograd.grad(value(), parameters)
    generator = torch.Generator().manual_seed(3)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        way /= way.norm()
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(way, alpha=sign * 1e-6)
                sides.append(value().item())
                parameter.sub_(way, alpha=sign * 1e-6)
        wanted = (sides[0] - sides[1]) / 2e-6
        assert float((gradient * way).sum()) == pytest.approx(wanted, rel=1e-6, abs=1e-7)


def test_training_lowers_what_it_minimises_and_leaves_the_model_alone():
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with frozen(model):
        meta = Meta(model, edit_matrices(model, [0, 1], PARTS), some_lessons(20), replace(SETTINGS, steps=60))
        meta.fit_moments(lambda *_: None)
        fixed = meta.taught[:6]
        values = []
        for _ in range(60):
            if len(values) in (0, 59):
                loss = meta.losses(fixed, random.Random(0), 1)
                values.append(0.5 * loss[0].item() + loss[1].item())
            else:
                values.append(0.0)
            meta.advance()
    assert values[-1] < 0.9 * values[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("interrupted", [1, 4])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, interrupted):
    model = tiny_llama()
    matrices = edit_matrices(model, [0, 1], PARTS)
    path = tmp_path / "network.safetensors"

    def stop(what, done, total):
        if what.startswith("training") and done == interrupted:
            raise KeyboardInterrupt

    with frozen(model):
        whole = train_hypernetwork(model, matrices, some_lessons(20), SETTINGS)
        with pytest.raises(KeyboardInterrupt):
            train_hypernetwork(model, matrices, some_lessons(20), SETTINGS, path=path, key="k", progress=stop)
        steps = []
        again = train_hypernetwork(
            model,
            matrices,
            some_lessons(20),
            SETTINGS,
            path=path,
            key="k",
            progress=lambda w, d, t: steps.append((w, d)),
        )
    assert [done for what, done in steps if what.startswith("training")] == list(range(interrupted + 1, 7))
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name
    assert again.history == whole.history


def test_another_training_in_the_file_is_not_gone_on_with(tmp_path):
    model = tiny_llama()
    matrices = edit_matrices(model, [0, 1], PARTS)
    with frozen(model):
        train_hypernetwork(model, matrices, some_lessons(), replace(SETTINGS, steps=1), path=tmp_path / "n", key="one")
        other = Meta(model, matrices, some_lessons(), SETTINGS)
        assert not other.restore(tmp_path / "n", "two")
        (tmp_path / "n").write_bytes(b"damaged")
        assert not other.restore(tmp_path / "n", "one")


def test_lessons_are_rephrases_and_locality_prompts_or_texts():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    prompter = Prompter.of(model, tokenizer)
    near = (Locality(prompt="Who?", answer="me"), Locality(prompt="Where?", answer=None))
    edit_ = Edit(prompt="abc", target="de", rephrases=("abd", "abe"), locality=near, row=1)
    (lesson,) = lessons(model, prompter, [edit_], None, 0)
    assert [tokenizer.decode(row.ids, skip_special_tokens=True) for row in lesson.asked] == ["abd de", "abe de"]
    assert tokenizer.decode(lesson.kept[0].ids, skip_special_tokens=True) == "Who? me"
    assert lesson.kept[1].num_targets == 1
    bare = Edit(prompt="abc", target="de", row=2)
    (lesson,) = lessons(model, prompter, [bare], split_texts(["some text", "another one"]), 0)
    assert lesson.asked == (lesson.row,)
    assert lesson.kept[0].prompt_length == 1
    with pytest.raises(ConfigError, match=r"train edit 2 has no locality prompt.*give --texts"):
        lessons(model, prompter, [bare], None, 0)


# ---------------------------------------------------------------- edits

TRAIN = [
    Edit(prompt=f"What is {i} of {chr(97 + i)}?", target=f"{chr(97 + i)}{i}", rephrases=(f"Tell {i}",), row=i + 1)
    for i in range(20)
]
EDITS = [Edit(prompt="Who is it?", target="me", row=1), Edit(prompt="Where is it?", target="here", row=2)]
TEXTS = [f"Text number {i} speaks of a mill and {i + 3} coins." for i in range(10)]


def run(model, edits=EDITS, **settings):
    options = {"train_edits": TRAIN, "texts": TEXTS, **FAST, **settings}
    return edit(model, tiny_tokenizer(), edits, editor="mend", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_it_edits_models_of_many_kinds(name, dtype):
    model = tiny_model(name, dtype=dtype)
    result = run(model, step_size=1e-3)
    matrices = Config().matrices(model, None)
    assert {m.layer for m in matrices} == {1, 2, 3}
    assert set(result.delta) == {m.name for m in matrices}
    assert all(change.norm() > 0 for change in result.delta.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_round_adds_up_what_its_edits_would_do_alone():
    alone = [run(tiny_model("llama"), [one]).delta for one in EDITS]
    both = run(tiny_model("llama"), round_size=2).delta
    after_another = run(tiny_model("llama"), round_size=1).delta
    for name, change in both.items():
        assert relative(change, alone[0][name] + alone[1][name]) < 1e-4  # weights are rounded in float32
        assert relative(after_another[name], change) > 1e-4


def test_auto_is_one_round_and_a_network_for_as_many_edits():
    settings = {"steps": "auto", "edits_per_step": "auto", "edits_per_update": "auto"}
    of_round = Config(**settings).meta(edit_matrices(tiny_llama(), [0], PARTS), 0, together=100)
    assert (of_round.edits_per_update, of_round.edits_per_step, of_round.steps) == (100, 100, 120)
    alone = Config().meta(edit_matrices(tiny_llama(), [0], PARTS), 0)
    assert (alone.edits_per_update, alone.edits_per_step, alone.steps) == (1, 10, 400)
    assert (alone.rank, alone.step_size) == (10, 0.13 / 32)
    result = run(tiny_model("llama"), edits_per_update="auto")
    assert [r["num_edits"] for r in result.metrics["rounds"]] == [2]
    result = run(tiny_model("llama"), edits_per_update=1)
    assert [r["num_edits"] for r in result.metrics["rounds"]] == [1, 2]


def test_of_many_edits_some_are_scored_and_all_make_the_update(monkeypatch):
    monkeypatch.setattr("crispedit.editors._meta.SCORED", 3)
    meta = meta_of(exact_llama(), count=8)
    stirred(meta.network)
    some = sorted(random.Random(0).sample(range(8), 3))
    found = meta.losses(meta.taught, random.Random(0), 8)
    monkeypatch.undo()
    truth = dense_losses(meta, meta.taught, 8, scored=some)
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)


def test_without_other_edits_it_says_what_is_missing(bundled):
    with pytest.raises(ConfigError, match="give --train-edits FILE, or --limit N"):
        run(tiny_model("llama"), train_edits=())
    with pytest.raises(ConfigError, match="there are none"):
        run(tiny_model("llama"), train_edits=EDITS)  # those to be made are not learned from
    with pytest.raises(ConfigError, match="editor mend learns from other edits"):
        EditJob(model="bundled", edits="bundled:demo", editor="mend").run()


def test_rows_beyond_the_limit_are_learned_from(monkeypatch):
    seen = []
    monkeypatch.setattr("crispedit.edit_job.edit_model", lambda *a, **k: seen.append((a[2], k["train_edits"])) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        EditJob(model="bundled", edits="bundled:demo", editor="mend", limit=5).run()
    with pytest.raises(ZeroDivisionError):
        EditJob(model="bundled", edits="bundled:demo", editor="ft", limit=5).run()
    with pytest.raises(ZeroDivisionError):
        EditJob(model="bundled", edits="bundled:demo", editor="mend", limit=5, train_edits="bundled:train").run()
    (edits, others), (_, none), (_, given) = seen
    assert len(given) == 2000
    assert len(edits) == 5
    assert [other.row for other in others] == list(range(6, 201))
    assert none == ()


# ---------------------------------------------------------------- the command


def train(out, *more) -> int:
    settings = [item for name, value in FAST.items() for item in ("--set", f"{name}={value}")]
    return _run(["train-mend", "bundled", "bundled:train", "--limit", "20", "--out", str(out), *settings, *more])


def test_a_network_is_trained_once_and_used(tmp_path, capsys):
    out, edited = tmp_path / "net", tmp_path / "edited"
    assert train(out, "--json", str(tmp_path / "t.json")) == 0
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["finished"]
    assert record["training"]["held_out_edits"] == 2
    assert record["fingerprint"] == fingerprint(load_model("bundled").model)
    first = load_file(out / "network.safetensors")
    assert not any(name.startswith("adam") for name in first)
    assert train(out) == 0  # nothing to do
    assert all(torch.equal(first[name], tensor) for name, tensor in load_file(out / "network.safetensors").items())
    options = ["--editor", "mend", "--set", f"network={out}", "--limit", "3", "--out", str(edited)]
    assert _run(["edit", "bundled", "bundled:demo", *options]) == 0
    assert (edited / "config.json").is_file()
    # the edited model is another one
    assert _run(["edit", str(edited), "bundled:demo", *options[:-1], str(tmp_path / "no")]) == 2
    assert "other weights" in capsys.readouterr().err
    assert train(out, "--seed", "1") == 2
    assert "holds another training" in capsys.readouterr().err
    assert train(out, "--seed", "1", "--overwrite") == 0


def test_an_unfinished_or_foreign_directory_is_refused(tmp_path, capsys):
    out = tmp_path / "net"
    assert train(out) == 0
    record = json.loads((out / "mend.json").read_text())
    (out / "mend.json").write_text(json.dumps({**record, "finished": False}))
    use = ["edit", "bundled", "bundled:demo", "--editor", "mend", "--limit", "3", "--out", str(tmp_path / "no")]
    assert _run([*use, "--set", f"network={out}"]) == 2
    assert "is not finished" in capsys.readouterr().err
    assert _run([*use, "--set", f"network={tmp_path}"]) == 2
    assert "has no mend.json" in capsys.readouterr().err
    (out / "mend.json").write_text(json.dumps(record))
    assert _run([*use, "--set", f"network={out}", "--layers", "1-2"]) == 2
    assert "edits other matrices" in capsys.readouterr().err
    (out / "network.safetensors").write_bytes(b"damaged")
    assert _run([*use, "--set", f"network={out}"]) == 2
    assert "cannot read the hypernetwork" in capsys.readouterr().err


def test_ctrl_c_leaves_a_training_that_goes_on(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole) == 0
    advance = Meta.advance

    def interrupted(meta):
        if meta.step == 2:
            raise KeyboardInterrupt
        advance(meta)

    monkeypatch.setattr(Meta, "advance", interrupted)
    assert train(parts) == 130
    monkeypatch.setattr(Meta, "advance", advance)
    assert not json.loads((parts / "mend.json").read_text())["finished"]
    assert train(parts) == 0
    one, other = load_file(whole / "network.safetensors"), load_file(parts / "network.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
