"""Every family, from its matrices to an edited checkpoint in which nothing else changed; and what is refused."""

import json
import logging
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Conv1D

from crispedit.checkpoint import load_edited, write_model
from crispedit.editing import edit
from crispedit.errors import ConfigError, ModelError
from crispedit.generation import answers
from crispedit.models import (
    _say_that_float32_is_faster,
    decoder_blocks,
    default_layers,
    edit_matrices,
    fingerprint,
    frozen,
    load_model,
    load_skeleton,
    parse_layers,
)
from crispedit.rows import Prompter
from families import AWKWARD, CHATML, EXPERTS, FAMILIES, tiny_model, tiny_tokenizer

EDITS = [
    {"prompt": "Ada lives in", "target": "Rome"},
    {"prompt": "Bob lives in", "target": "Oslo"},
    {"prompt": "The sky is", "target": "red"},
    {"prompt": "Two and two make", "target": "5"},
]
PROMPTS, TARGETS = [row["prompt"] for row in EDITS], [row["target"] for row in EDITS]
TEXTS = ["The quick brown fox jumps.", "A stitch in time saves nine.", "All is well.", "So it goes.", "Ada left."]
SETTINGS = {"lr": 2e-2, "epochs": 50, "chat": "off"}
PLAIN, CRISP = {"energy": 0.0}, {"energy": 0.8, "texts": TEXTS}
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def checkpoint(tmp_path) -> Callable[..., str]:
    """Writes a tiny model with its tokenizer, as anyone would publish it; returns the directory."""

    def write(name="llama", model=None, **options):
        directory = tmp_path / "base"
        (model or tiny_model(name, **options)).save_pretrained(directory)
        tiny_tokenizer(chat_template=CHATML).save_pretrained(directory)
        return str(directory)

    return write


def dtypes(state):
    return {name: tensor.dtype for name, tensor in state.items()}


def asked(model, tokenizer):
    return [a.text for a in answers(model, Prompter.of(model, tokenizer, chat="off"), [*PROMPTS, "Who?", "x"])]


# --- which matrices ---------------------------------------------------------------------------------------------------
EXPECTED = {  # the matrix of block 2
    "llama": ("model.layers.2.mlp.down_proj.weight", (32, 48)),
    "qwen2": ("model.layers.2.mlp.down_proj.weight", (32, 48)),
    "qwen3": ("model.layers.2.mlp.down_proj.weight", (32, 48)),
    "mistral": ("model.layers.2.mlp.down_proj.weight", (32, 48)),
    "gemma2": ("model.layers.2.mlp.down_proj.weight", (32, 48)),
    "gemma3": ("model.layers.2.mlp.down_proj.weight", (32, 48)),
    "phi3": ("model.layers.2.mlp.down_proj.weight", (32, 48)),
    "gpt2": ("transformer.h.2.mlp.c_proj.weight", (32, 48)),
    "gpt_neox": ("gpt_neox.layers.2.mlp.dense_4h_to_h.weight", (32, 48)),
    "olmo2": ("model.layers.2.mlp.down_proj.weight", (32, 48)),
    "llama, square": ("model.layers.2.mlp.down_proj.weight", (32, 32)),
    "qwen3, square": ("model.layers.2.mlp.down_proj.weight", (32, 32)),
    "gpt2, square": ("transformer.h.2.mlp.c_proj.weight", (32, 32)),
    "gpt2, no n_inner": ("transformer.h.2.mlp.c_proj.weight", (32, 128)),
    "gpt_neox, square": ("gpt_neox.layers.2.mlp.dense_4h_to_h.weight", (32, 32)),
}


@pytest.mark.parametrize("name", [*FAMILIES, *AWKWARD])
def test_the_down_projections_are_found(name):
    model = tiny_model(name)
    expected, shape = EXPECTED[name]
    matrices = edit_matrices(model, [3, 2, 2])
    assert [m.name for m in matrices] == [expected, expected.replace("2", "3", 1)]
    assert [m.layer for m in matrices] == [2, 3]
    assert {m.shape for m in matrices} == {shape}
    assert matrices[0].parameter is model.get_parameter(expected)
    assert [m.layer for m in edit_matrices(model)] == [0, 1, 2]
    assert decoder_blocks(model)[0] == expected.partition(".2.")[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt2, square"])
def test_a_weight_is_w_of_y_equals_w_a_and_writes_to_the_model(name):
    model = tiny_model(name)
    (matrix,) = edit_matrices(model, [1])
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        a, before = torch.randn(5, matrix.shape[1]), model(ids).logits
        bias = matrix.module.bias if isinstance(matrix.module, Conv1D) else 0
        assert torch.allclose(matrix.module(a), a @ matrix.weight.T + bias, atol=1e-5)
        matrix.weight.mul_(2)
        assert not torch.allclose(model(ids).logits, before)
        matrix.weight.div_(2)
        assert torch.equal(model(ids).logits, before)


# --- an edit, from end to end -----------------------------------------------------------------------------------------
CASES = [
    *((name, how, FLOAT32) for name in FAMILIES for how in (PLAIN, CRISP)),
    ("llama, square", CRISP, FLOAT32),
    ("gpt2, square", CRISP, FLOAT32),
    ("llama", CRISP, BFLOAT16),
    ("gpt2", CRISP, BFLOAT16),
    ("llama", PLAIN, FLOAT16),  # stored; on a CPU it computes in float32
    ("gpt2", PLAIN, FLOAT16),  # its embeddings are tied to its head, as are Gemma's
    ("gemma2", PLAIN, FLOAT16),
]


@pytest.mark.parametrize(
    ("name", "how", "stored"), [pytest.param(*case, id=f"{case[0]}-{case[1]['energy']}-{case[2]}") for case in CASES]
)
def test_an_edit_is_made_kept_on_disk_and_changes_nothing_else(name, how, stored, checkpoint, tmp_path):
    base, out = checkpoint(name, dtype=stored), tmp_path / "edited"
    loaded = load_model(base)
    model, tokenizer = loaded.model, loaded.tokenizer
    before = {key: value.clone() for key, value in model.state_dict().items()}
    needed = [parameter.requires_grad for parameter in model.parameters()]
    edited = {m.name for m in edit_matrices(model)}

    result = edit(model, tokenizer, EDITS, stored_dtype=loaded.stored_dtype, **how, **SETTINGS)
    given = asked(model, tokenizer)
    assert given[: len(EDITS)] == TARGETS
    assert result.metrics["before"]["reliability"] == 0
    assert result.metrics["after"]["reliability"] == 100
    assert [change.outside is None or change.outside <= 1e-5 for change in result.changes] == [True] * len(edited)
    result.save(out)

    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=model.dtype)
    again = AutoTokenizer.from_pretrained(out)
    assert asked(reloaded, again) == given
    assert again(TEXTS) == tokenizer(TEXTS)
    assert again.chat_template == CHATML
    for state in (model.state_dict(), reloaded.state_dict()):
        assert dtypes(state) == dtypes(before)
        assert {key for key in before if not torch.equal(state[key], before[key])} == edited
    old, new = (load_file(f"{directory}/model.safetensors") for directory in (base, out))
    assert dtypes(old) == dtypes(new)
    assert {key for key in old if not torch.equal(old[key], new[key])} == edited
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text()) == json.loads((tmp_path / "base" / file).read_text())
    assert needed == [parameter.requires_grad for parameter in model.parameters()]
    assert not model.training


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_delta_is_put_onto_its_base_and_onto_no_other(name, checkpoint, tmp_path):
    loaded = load_model(checkpoint(name))
    result = edit(loaded.model, loaded.tokenizer, EDITS, model_name=str(tmp_path / "base"), **PLAIN, **SETTINGS)
    result.save(tmp_path / "delta", form="delta")
    again = load_edited(str(tmp_path / "delta"))
    assert asked(again.model, again.tokenizer) == asked(loaded.model, loaded.tokenizer)
    for one, other in zip(edit_matrices(again.model), edit_matrices(loaded.model), strict=True):
        assert torch.allclose(one.weight, other.weight, rtol=0, atol=1e-6)
    checkpoint(name, seed=1)
    with pytest.raises(ModelError, match="is not as it was: the patch is for another model"):
        load_edited(str(tmp_path / "delta"))


def test_a_tensor_of_another_dtype_is_saved_as_it_is(tmp_path):
    """Some models keep a few tensors in float32, whatever the dtype of the rest."""
    model = tiny_model("llama", dtype=BFLOAT16)
    model.model.norm.weight = nn.Parameter(torch.linspace(0.9, 1.1, 32))
    write_model(model, tiny_tokenizer(), tmp_path, BFLOAT16)
    stored = load_file(tmp_path / "model.safetensors")
    assert dtypes(stored) == dtypes(model.state_dict())
    assert torch.equal(stored["model.norm.weight"], model.model.norm.weight)


# --- layers -----------------------------------------------------------------------------------------------------------
def test_the_default_layers_are_those_measured_and_always_in_the_model():
    """The paper's at 32 blocks; at 8 those of docs/decisions.md."""
    assert default_layers(32) == (19, 20, 21, 22, 23)
    assert default_layers(8) == (1, 2, 3, 4, 5)
    for count in range(1, 101):
        layers = default_layers(count)
        assert 1 <= len(layers) <= 5
        assert layers == tuple(range(layers[0], layers[-1] + 1))
        assert set(layers) <= set(range(count))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("7", (7,)),
        ("19-23", (19, 20, 21, 22, 23)),
        ("4,5,6", (4, 5, 6)),
        ("2,4-6", (2, 4, 5, 6)),
        (" 6, 4-5 ,5 ", (4, 5, 6)),
        ("3-3", (3,)),
        ("0", (0,)),
    ],
)
def test_layers_are_numbers_and_inclusive_ranges(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1,", ",1", "-1", "1-", "1--2", "1-2-3", "1.5", "1;2", "1 2", "²", "9-7"])
def test_other_layers_are_refused(text):
    with pytest.raises(ConfigError, match=f"layers is '{text}'; (it must look like|the range 9-7 runs backwards)"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("layers", "message"), [([], "no layer is given"), ([1, 4], "layer 4 is outside .* 0 to 3"), ([-1], "layer -1")]
)
def test_layers_outside_the_model_are_refused(layers, message):
    with pytest.raises(ConfigError, match=message):
        edit_matrices(tiny_model("llama"), layers)


# --- what is refused --------------------------------------------------------------------------------------------------
def _tie_weights(model):
    blocks = model.model.layers
    blocks[3].mlp.down_proj.weight = blocks[0].mlp.down_proj.weight


def _tie_modules(model):
    blocks = model.model.layers
    blocks[3].mlp = blocks[0].mlp


def _store_as(dtype):
    def change(model):
        for block in model.model.layers:
            weight = block.mlp.down_proj.weight.data.to(dtype)
            block.mlp.down_proj.weight = nn.Parameter(weight, requires_grad=False)

    return change


def _no_blocks(model):
    model.config.num_hidden_layers = 5


def _no_projection(model):
    model.config.intermediate_size = 47


def _quantised_config(model):
    model.config.quantization_config = {"quant_method": "torchao"}


REFUSED = {
    **{name: (name, None, "mixture of experts .*experts.*; crispedit edits dense models only") for name in EXPERTS},
    "tied weights": ("llama", _tie_weights, "layers.0.mlp.down_proj.weight is shared with model.layers.3.mlp"),
    "tied modules": ("llama", _tie_modules, "layers.0.mlp.down_proj.weight is shared with model.layers.3.mlp"),
    "int8": ("llama", _store_as(torch.int8), "layers.0 has quantised weights .mlp.down_proj.weight"),
    "float8": ("llama", _store_as(torch.float8_e4m3fn), "layers.0 has quantised weights .mlp.down_proj.weight"),
    "quantised": ("llama", _quantised_config, "LlamaForCausalLM is quantised"),
    "no blocks": ("llama", _no_blocks, "no list of 5 decoder blocks"),
    "no projection": ("llama", _no_projection, "layers.0 has no MLP .*: no linear map from 47 to 32 numbers"),
}


@pytest.mark.parametrize(("name", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_edited_is_refused_and_left_as_it_was(name, change, message):
    model = tiny_model(name)
    if change:
        change(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=message) as refused:
        edit(model, tiny_tokenizer(), EDITS, **PLAIN, **SETTINGS)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- loading ----------------------------------------------------------------------------------------------------------
def _rewrite_config(**changes):
    def spoil(base):
        config = base / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    return spoil


def _rewrite_weights(change):
    def spoil(base):
        weights = load_file(base / "model.safetensors")
        change(weights)
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _pickle(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def _truncate(base):
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base: (base / "config.json").unlink(), "has no config.json"),
        (lambda base: (base / "config.json").write_text("{"), "not a valid JSON"),
        (_rewrite_config(model_type="unheard_of"), "unheard_of"),
        (_rewrite_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "is quantised"),
        (_rewrite_config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised"),
        (_pickle, "no file named model.safetensors"),
        (_truncate, "cannot load the model"),
        (_rewrite_weights(lambda weights: weights.pop(DOWN)), f"not a whole LlamaForCausalLM: .* for {DOWN}"),
        (_rewrite_weights(lambda weights: weights.update({DOWN: torch.zeros(3, 3)})), "cannot load the model"),
        (lambda base: [file.unlink() for file in base.glob("tokenizer*")], "cannot load the model"),
    ],
    ids=[
        "no config", "broken config", "unknown type", "bitsandbytes", "gptq",
        "pickled", "truncated", "missing weight", "misshapen weight", "no tokenizer",
    ],
)  # fmt: skip
def test_a_directory_that_is_no_whole_model_is_refused_in_one_line(spoil, message, checkpoint, tmp_path):
    base = checkpoint()
    spoil(tmp_path / "base")
    with pytest.raises(ModelError, match=message) as refused:
        load_model(base)
    assert base in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "no-such-model", "./no/such/directory", ""])
def test_a_model_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(ModelError, match=f"'{name}'") as refused:
        load_model(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float23"}, r"dtype is 'float23'; it must be auto, float32, .* \(did you mean"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
    ],
)
def test_a_device_or_dtype_that_is_not_there_is_refused(options, message, checkpoint):
    with pytest.raises(ConfigError, match=message):
        load_model(checkpoint(), **options)


@pytest.mark.parametrize(
    ("stored", "options", "computes"),
    [
        (FLOAT32, {}, FLOAT32),
        (BFLOAT16, {}, BFLOAT16),
        (FLOAT16, {"device": "cpu"}, FLOAT32),
        (BFLOAT16, {"dtype": "float32"}, FLOAT32),
        (FLOAT32, {"dtype": "bfloat16"}, BFLOAT16),
        (FLOAT32, {"device_map": "auto"}, FLOAT32),
        (BFLOAT16, {"device_map": "cpu"}, BFLOAT16),
    ],
)
def test_a_model_is_loaded_as_it_was_stored_or_as_asked(stored, options, computes, checkpoint):
    base = checkpoint(dtype=stored)
    loaded = load_model(base, **options)
    assert (loaded.stored_dtype, loaded.model.dtype, loaded.name) == (stored, computes, base)
    assert not loaded.model.training
    if stored.itemsize <= computes.itemsize:  # a wider dtype holds the same numbers
        assert fingerprint(loaded.model) == fingerprint(tiny_model("llama", dtype=stored))


@pytest.mark.parametrize(
    ("emulated", "options", "said"), [(True, {}, 1), (True, {"dtype": "bfloat16"}, 0), (False, {}, 0)]
)
def test_where_float32_is_faster_that_is_said_once(emulated, options, said, checkpoint, monkeypatch, caplog):
    monkeypatch.setattr("crispedit.models.emulates_bfloat16", lambda: emulated)
    _say_that_float32_is_faster.cache_clear()
    base = checkpoint(dtype=BFLOAT16)
    with caplog.at_level(logging.INFO, "crispedit"):
        for load in (load_model, load_skeleton):
            load(base, device="cpu", **options)
    assert sum("--dtype float32 is faster" in record.message for record in caplog.records) == said


def test_a_model_spread_by_a_device_map_can_be_edited(checkpoint, tmp_path):
    loaded = load_model(checkpoint(), device_map="auto")
    result = edit(loaded.model, loaded.tokenizer, EDITS, **PLAIN, **SETTINGS)
    result.save(tmp_path / "edited")
    assert asked(loaded.model, loaded.tokenizer)[: len(EDITS)] == TARGETS


# --- fingerprint and frozen -------------------------------------------------------------------------------------------
def test_a_fingerprint_tells_weights_apart_and_survives_saving(checkpoint):
    model = tiny_model("llama")
    (matrix,) = edit_matrices(model, [2])
    original = fingerprint(model)
    assert fingerprint(load_model(checkpoint(model=model)).model) == original == fingerprint(tiny_model("llama"))
    assert fingerprint(tiny_model("llama", seed=1)) != original
    matrix.weight[0, 0] += 1e-6
    assert fingerprint(model) != original


def test_a_fingerprint_samples_large_matrices_evenly():
    """A change of a single number may go unseen; one of a whole row or column of a matrix does not."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=80)  # 64 × 80 is 5 × 1,024 numbers
    (matrix,) = edit_matrices(model, [2])
    matrix.weight.zero_()
    original = fingerprint(model)

    def seen(entries):
        entries += 1
        found = fingerprint(model) != original
        entries -= 1
        return found

    assert [seen(matrix.weight[0, i : i + 1]) for i in range(10)] == [True, False, False, False, False] * 2
    assert all(seen(row) for row in matrix.weight)
    assert not all(seen(column) for column in matrix.weight.T)


def test_frozen_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    model.lm_head.weight.requires_grad_(False)
    with frozen(model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.model.norm.weight = nn.Parameter(torch.ones(32), requires_grad=False)  # as an edit does
    assert model.training
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_parts_of_a_block_are_found_in_every_family(name):
    """Each is what the block computes with it: of shape (out, hidden), no down-projection, in the block it names."""
    model = tiny_model(name)
    hidden = model.config.get_text_config().hidden_size
    (down,) = edit_matrices(model, (1,))
    for part in ("gate", "up", "query", "value"):
        (matrix,) = edit_matrices(model, (1,), (part,))
        assert matrix.shape[1] == hidden
        assert matrix.name != down.name
        assert ".1." in matrix.name
    both = edit_matrices(model, (1, 2), ("gate", "up"))
    assert len(both) in (2, 4)
    assert [m.layer for m in both] == sorted(m.layer for m in both)
    gate, up = (edit_matrices(model, (1,), (part,))[0].name for part in ("gate", "up"))
    if "gate_proj" in "".join(dict(model.named_modules())):
        assert (gate.split(".")[-2], up.split(".")[-2]) == ("gate_proj", "up_proj")
