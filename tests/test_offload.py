"""Blocks that wait on disk or elsewhere: the same model, the same edit, and nothing is read while it is trained."""

import hashlib
import json

import pytest
import torch
import transformers
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import load_file, save_file

from crispedit import cli, editing
from crispedit.budget import Budgeted
from crispedit.checkpoint import check_files, load_edited, write_model
from crispedit.editing import edit
from crispedit.errors import ConfigError, EditFailed
from crispedit.models import decoder_blocks, edit_matrices, fingerprint, load_model
from crispedit.offload import State, in_one_place, waiting
from crispedit.processes import ALONE, Processes
from families import CHATML, FAMILIES, tiny_model, tiny_tokenizer

EDITS = [{"prompt": "Ada lives in", "target": "Rome"}, {"prompt": "The sky is", "target": "red"}]
TEXTS = [f"{who} lives in {place} ." for who in ("Ada", "Bob", "Eve") for place in ("Rome", "Oslo", "Bern", "York")]
SETTINGS = {"layers": [2, 3], "texts": TEXTS, "chat": "off", "budget": "5%"}


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny model of four blocks with its tokenizer, as anyone would publish it."""

    def write(name="llama", dtype=torch.float32) -> str:
        directory = tmp_path / name
        tiny_model(name, dtype=dtype).save_pretrained(directory)
        tiny_tokenizer(chat_template=CHATML).save_pretrained(directory)
        return str(directory)

    return write


@pytest.fixture
def reads(monkeypatch):
    """The tensors that are brought from where they wait."""
    found = []
    get = OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", lambda self, name: found.append(name) or get(self, name))
    return found


def from_block(first):
    """The matrices of an edit that begins there."""
    return lambda model: edit_matrices(model, range(first, 4))


def hashes(directory):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.glob("*.safetensors"))}


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_has_one_place_and_blocks_below_wait(name):
    model = tiny_model(name)
    path, blocks = decoder_blocks(model)
    places = waiting(model, path, 2, "disk", torch.device("cpu"))
    for tensor in [*dict(model.named_parameters()), *dict(model.named_buffers())]:
        (where,) = [place for part, place in places.items() if f"{tensor}.".startswith(f"{part}.")]
        below = any(tensor.startswith(f"{path}.{number}.") for number in (0, 1))
        assert where == ("disk" if below else "cpu"), tensor
    assert len(blocks) > 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.float16, "auto")]
)
def test_a_model_of_which_blocks_wait_is_the_same_model(name, stored, dtype, checkpoint):
    source = checkpoint(name, stored)
    whole, parts = (
        load_model(source, dtype=dtype),
        load_model(source, dtype=dtype, offload="disk", edited=from_block(2)),
    )
    assert {p.is_meta for p in decoder_blocks(parts.model)[1][:2].parameters()} == {True}
    assert not any(p.is_meta for p in decoder_blocks(parts.model)[1][2:].parameters())
    expected, found = whole.model.state_dict(), State(parts.model)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert fingerprint(parts.model) == fingerprint(whole.model)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        assert torch.equal(parts.model(ids).logits, whole.model(ids).logits)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_an_edit_is_the_same_and_reads_nothing_while_it_is_trained(stored, checkpoint, tmp_path, reads, monkeypatch):
    source = checkpoint(dtype=stored)
    directories, counts = [], []
    after_epoch = Budgeted.after_epoch
    monkeypatch.setattr(Budgeted, "after_epoch", lambda self, low: counts.append(len(reads)) or after_epoch(self, low))
    for offload in (None, "disk"):
        loaded = load_model(source, offload=offload, edited=from_block(2))
        counts.clear()
        result = edit(loaded.model, loaded.tokenizer, EDITS, epochs=8, stored_dtype=loaded.stored_dtype, **SETTINGS)
        directories.append(tmp_path / f"edited-{len(directories)}")
        result.save(directories[-1])
    assert hashes(directories[1]) == hashes(directories[0])
    # drift was measured after every epoch; what is read is for the passes before and after
    assert len(counts) > 2
    assert set(counts) == {counts[0]} != {0}
    assert len(reads) > counts[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2's head is its embedding, and stored once
def test_of_a_model_that_waits_there_is_no_second_one_to_read(name, checkpoint, tmp_path, monkeypatch):
    """Where it would not fit into one place: files are compared with the weights, tensor by tensor."""
    loaded = load_model(checkpoint(name), offload="disk", edited=from_block(2))
    assert not in_one_place(loaded.model)
    assert in_one_place(tiny_model(name))
    result = edit(loaded.model, loaded.tokenizer, EDITS, epochs=2, **SETTINGS)
    monkeypatch.setattr(editing, "read_back", None)
    result.save(tmp_path / "edited")
    check_files(loaded.model, tmp_path / "edited", torch.float32)
    (file,) = (tmp_path / "edited").glob("*.safetensors")
    stored = load_file(file)
    for number, tensor in enumerate(stored):
        if number % 5 == 0:
            save_file({**stored, tensor: stored[tensor] + 1}, file)
            with pytest.raises(EditFailed, match=f"{tensor} of the saved model is not what was to be saved"):
                check_files(loaded.model, tmp_path / "edited", torch.float32)
            save_file({key: value for key, value in stored.items() if key != tensor}, file)
            with pytest.raises(EditFailed, match=f"the saved model has no ({tensor}|lm_head.weight)"):
                check_files(loaded.model, tmp_path / "edited", torch.float32)


def test_a_model_that_is_stored_under_other_names_than_it_has_is_compared_too(tmp_path):
    """As transformers stores language models with eyes: it reads the files itself, then."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tiny_tokenizer()), "query_pre_attn_scalar": 8}
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=1)
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), offload="disk", edited=from_block(2))
    edited = tmp_path / "edited"
    edited.mkdir()
    write_model(loaded.model, loaded.tokenizer, edited, torch.float32)
    stored = load_file(edited / "model.safetensors")
    assert set(stored) - set(State(loaded.model))
    check_files(loaded.model, edited, torch.float32)
    name = next(name for name in stored if name.endswith("layers.3.mlp.down_proj.weight"))
    save_file({**stored, name: stored[name] + 1}, edited / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EditFailed, match=r"1 tensors of the saved model are not those .*layers\.3\.mlp\.down_proj"):
        check_files(loaded.model, edited, torch.float32)


def test_an_edited_block_that_a_device_map_leaves_elsewhere_is_refused(checkpoint):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{number}": "disk" if number == 3 else "cpu" for number in range(4)}
    source = checkpoint()
    load_model(source, device_map=places, edited=lambda model: edit_matrices(model, [2]))
    with pytest.raises(
        ConfigError, match=r"leaves block 3, which is to be edited, on the CPU or disk: edit other --lay"
    ):
        load_model(source, device_map=places, edited=from_block(2))


def test_a_plan_counts_what_stays(checkpoint):
    loaded = load_model(checkpoint(), offload="disk", edited=from_block(2))
    matrices, alone = edit_matrices(loaded.model, [2, 3]), Processes(offload=True)
    held = sum(p.nbytes for p in loaded.model.parameters() if not p.is_meta)
    assert alone.weight_bytes(loaded.model, matrices, torch.float32) == held
    blocks = decoder_blocks(loaded.model)[1]
    assert alone.gathered_bytes(loaded.model, matrices, torch.float32) == sum(p.nbytes for p in blocks[0].parameters())
    assert ALONE.weight_bytes(loaded.model, matrices, torch.float32) == sum(p.nbytes for p in loaded.model.parameters())
    with pytest.raises(ConfigError, match="--offload is of one process"):
        Processes(2, offload=True)


def test_with_it_a_plan_takes_less_memory_by_the_blocks_below(tmp_path, capsys):
    peaks = []
    for index, options in enumerate(([], ["--offload", "cpu"])):
        file = tmp_path / f"{index}.json"
        assert (
            cli._run(["plan", "Llama-3-8B", "--limit", "64", *options, "--devices", "80GB", "--json", str(file)]) == 0
        )
        peaks.append(json.loads(file.read_text())["stages"]["proof"]["bytes"])
    below = json.loads(file.read_text())["settings"]["layers"][0] - 1  # one of them visits
    of_block = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    assert peaks[0] - peaks[1] == below * of_block
    assert "wait elsewhere" in capsys.readouterr().out


def test_the_command_line_finds_the_first_block_by_itself(checkpoint, tmp_path, monkeypatch, capsys):
    source = checkpoint()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.jsonl").write_text('{"prompt": "Ada lives in", "target": "Rome"}\n')
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    command = [source, "--texts", "texts.txt", "--layers", "2,3", "--offload", "disk"]
    assert cli._run(["curvature", *command, "--out", "curvature"]) == 0
    told = ["--curvature", "curvature", "--offload", "disk", "--epochs", "8", "--energy", "0.5", "--chat", "off"]
    assert cli._run(["edit", source, "edits.jsonl", *told, "--out", "edited"]) == 0, capsys.readouterr().err
    told.remove("--offload")
    told.remove("disk")
    assert cli._run(["edit", source, "edits.jsonl", *told, "--out", "whole"]) == 0
    assert hashes(tmp_path / "edited") == hashes(tmp_path / "whole")
    assert cli._run(["edit", source, "edits.jsonl", *told, "--offload", "dusk", "--out", "other"]) == 2
    assert "offload is 'dusk'; it must be cpu or disk (did you mean 'disk'?)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_what_cannot_wait_is_refused(checkpoint, tmp_path):
    source = checkpoint()
    with pytest.raises(ConfigError, match="offload is cpu, and the whole model is there"):
        load_model(source, offload="cpu", edited=from_block(2), device="cpu")
    loaded = load_model(source)
    edit(loaded.model, loaded.tokenizer, EDITS, model_name=source, **SETTINGS).save(tmp_path / "patch", form="delta")
    assert load_edited(str(tmp_path / "patch"), offload="disk", edited=from_block(2))
    with pytest.raises(ConfigError, match="which waits elsewhere"):
        load_edited(str(tmp_path / "patch"), offload="disk", edited=from_block(3))
