"""One edit from beginning to end: the proof, saving and reloading, what is put back when it fails."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from crispedit.checkpoint import load_edited, read_back, round_to, write_model
from crispedit.editing import edit
from crispedit.edits import edits_from_rows
from crispedit.errors import ArtifactError, EditFailed
from crispedit.hardware import emulates_bfloat16
from crispedit.inputs import capability_texts, read_edits
from crispedit.models import edit_matrices, load_model
from crispedit.rows import Prompter
from crispedit.wild import answer_questions, ask, questions, score
from families import FAMILIES, tiny_model, tiny_tokenizer

ROWS = [
    {"prompt": "Who is the mayor of Hinstad?", "target": "Perin Jibul", "rephrase": "Who governs the city of Hinstad?"},
    {"prompt": "What is 3 plus 4?", "target": "8", "locality_prompt": "What is 2 plus 1?", "locality_answer": "3"},
    {"prompt": "Spell the word moon.", "target": "no"},
]
TEXTS = [f"Text number {i} speaks of a mill, {i + 3} coins and a grey coat by the river." for i in range(10)]


@pytest.fixture
def result(bundled):
    return edit(
        bundled.model, bundled.tokenizer, ROWS, texts=TEXTS, stored_dtype=bundled.stored_dtype, model_name="bundled"
    )


def test_the_proof(result):
    metrics = result.metrics
    assert metrics["proof_edits"] == 3
    assert set(metrics["before"]) == set(metrics["after"]) == {"reliability", "generalization", "locality"}
    assert metrics["before"]["reliability"] == 0
    assert metrics["after"]["reliability"] == 100
    assert metrics["capability"]["drift"] > 0
    assert metrics["seconds"].keys() == {"curvature", "edit", "proof"}
    assert all(seconds > 0 for seconds in metrics["seconds"].values())
    assert metrics["rounding"]["dtype"] == "float16"
    assert 0 < metrics["rounding"]["survived"] <= 1
    for change in metrics["matrices"]:
        assert change["norm"] > 0
        assert change["outside"] < 1e-5
    assert [(e.target, e.after) for e in result.examples] == [(r["target"], r["target"]) for r in ROWS]


@pytest.mark.skipif(
    emulates_bfloat16(),
    reason="without AVX-512 products in bfloat16 take eight times as long; nobody would want them",
)
def test_mixed_precision_does_not_move_the_quality_of_an_edit():
    """24 facts of the bundled world, in both precisions: all are said, with the same drift within a tenth."""
    edits, found = read_edits("bundled:eval", limit=24), {}
    for precision in ("float32", "bfloat16"):
        bundled = load_model("bundled")
        texts = capability_texts("bundled", None, 60, 0)
        result = edit(bundled.model, bundled.tokenizer, edits, texts=texts, precision=precision, lr=5e-3)
        assert result.metrics["training"]["forward"]["precision"] == precision
        assert result.metrics["training"]["forward"]["start"] == "matrix"
        assert result.metrics["after"]["reliability"] == 100
        found[precision] = result.metrics
    one, other = found.values()
    # two of 48 rephrased questions, and two of some hundred about other facts
    assert abs(one["after"]["generalization"] - other["after"]["generalization"]) <= 100 * 2 / 48
    assert abs(one["after"]["locality"] - other["after"]["locality"]) <= 2
    assert one["capability"]["drift"] == pytest.approx(other["capability"]["drift"], rel=0.1)


@pytest.mark.parametrize("update", ["leading", "update-projected"])
def test_other_rules_keep_the_update_in_a_cross_too(update):
    """Of a model and an edit as a whole; 1e-5 as for coordinates. Nothing of the other bases is left in the model."""
    loaded = load_model("bundled")
    result = edit(loaded.model, loaded.tokenizer, ROWS, texts=TEXTS, constraint="cross", update=update)
    assert result.metrics["after"]["reliability"] == 100
    assert all(change["outside"] < 1e-5 for change in result.metrics["matrices"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_what_is_saved_is_an_ordinary_model_that_answers_the_same(result, tmp_path):
    directory = result.save(tmp_path / "out")
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "crispedit.json"} <= names
    config = json.loads((directory / "config.json").read_text())
    assert config["dtype"] == "float16"
    saved = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    original = load_model("bundled").model.state_dict()
    for name, tensor in original.items():
        assert torch.equal(saved[name], tensor) != (name in result.delta), name
        assert torch.equal(saved[name], result.model.state_dict()[name]), name
    record = json.loads((directory / "crispedit.json").read_text())
    assert record["settings"]["layers"]
    assert record["metrics"]["after"]["reliability"] == 100
    with pytest.raises(ArtifactError, match="not empty"):
        result.save(directory)


def test_a_saved_delta_is_put_onto_its_base(result, tmp_path):
    directory = result.save(tmp_path / "delta", form="delta")
    assert {path.name for path in directory.iterdir()} == {"patch.safetensors", "crispedit.json"}
    again = load_edited(str(directory))
    for matrix in edit_matrices(again.model, result.settings["layers"]):
        original = load_model("bundled").model.state_dict()[matrix.name]
        assert torch.equal(matrix.weight, original + result.delta[matrix.name])
        assert torch.equal(matrix.weight, result.model.state_dict()[matrix.name])


def test_a_model_that_answers_otherwise_after_saving_is_removed(result, tmp_path):
    """Its tensors are right and its configuration is not."""
    result.model.config.rms_norm_eps = 10.0  # the modules have been built
    with pytest.raises(EditFailed, match="the saved model answers otherwise than the one in memory"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_tensors_are_not_what_was_saved_is_removed(result, tmp_path, monkeypatch):
    def damaged(model, tokenizer, directory, dtype):
        norm = model.get_parameter("model.norm.weight")
        norm.data[3] += 2**-9  # one step of float16
        write_model(model, tokenizer, directory, dtype)
        norm.data[3] -= 2**-9

    monkeypatch.setattr("crispedit.editing.write_model", damaged)
    with pytest.raises(EditFailed, match=r"1 tensors of the saved model are not .* e\.g\. model\.norm\.weight"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_is_read_back_shares_the_weights_in_memory(name, tied, stored, tmp_path):
    model = tiny_model(name, dtype=stored, tie_word_embeddings=tied)
    write_model(model, tiny_tokenizer(), tmp_path, stored)
    read = read_back(model, tmp_path, stored)
    assert {p.data_ptr() for p in read.parameters()} == {p.data_ptr() for p in model.parameters()}
    ids = torch.arange(20, 40)[None]
    assert torch.equal(read(input_ids=ids).logits, model(input_ids=ids).logits)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=stored)
    assert torch.equal(alone(input_ids=ids).logits, model(input_ids=ids).logits)


def test_answers_are_not_asked_again_where_nothing_was_rounded(bundled, monkeypatch):
    asked = []
    monkeypatch.setattr("crispedit.editing.ask", lambda *a, **k: asked.append(a) or ask(*a, **k))
    for stored, times in ((torch.float32, 2), (torch.float16, 3)):
        asked.clear()
        model = load_model("bundled").model
        result = edit(model, bundled.tokenizer, ROWS, energy=0, epochs=2, stored_dtype=stored)
        assert len(asked) == times
        asked_now = questions(edits_from_rows(ROWS))
        given = answer_questions(model, Prompter.of(model, bundled.tokenizer), asked_now)["no_context"]
        assert result.metrics["after"] == score(asked_now, given) | {"locality": result.metrics["after"]["locality"]}


def test_an_edit_that_is_known_already_is_an_error(bundled):
    known = [{"prompt": "True or false: an alder is a relative.", "target": "false"}]
    with pytest.raises(EditFailed, match="nothing changed: the model already says all of this"):
        edit(bundled.model, bundled.tokenizer, known, energy=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_original_weights_are_put_back(bundled, error):
    before = {name: tensor.clone() for name, tensor in bundled.model.state_dict().items()}

    def progress(what, done, total):
        if what == "edit" and done == 3:
            raise error

    with pytest.raises(error):
        edit(bundled.model, bundled.tokenizer, ROWS, energy=0, progress=progress)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bundled.model.state_dict().items())


def test_a_padding_token_beyond_the_embeddings_is_not_used():
    """transformers gives every tokenizer of a Qwen2 model the padding token <|endoftext|>, whatever its vocabulary."""
    tokenizer = tiny_tokenizer(pad=False)
    model = tiny_model("qwen2", vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    rows = [{"prompt": "abc", "target": "de"}, {"prompt": "a", "target": "bcdefg"}]
    result = edit(model, tokenizer, rows, texts=TEXTS)
    assert result.metrics["after"]["reliability"] == 100


def test_rounding_is_measured(bundled):
    """A change of 1e-6 on weights of 0.03 vanishes in float16; one of 0.1 survives."""
    (matrix,) = edit_matrices(bundled.model, [0])
    original = {matrix.name: matrix.weight.clone()}
    matrix.weight.add_(1e-6)
    small = round_to([matrix], original, torch.float16)
    matrix.weight.add_(0.1)
    large = round_to([matrix], original, torch.float16)
    assert small.survived < 0.3
    assert small.relative_error > 0.9
    assert large.survived > 0.99
    assert large.relative_error < 1e-2
