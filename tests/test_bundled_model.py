"""The bundled model: what it must know, how large it may be, and that its code still makes such a model."""

import json
import random
import subprocess
import sys

import pytest
import torch

from crispedit.bundled import MODEL_DIRECTORY, abilities, train, world
from crispedit.capability import bundled_tasks
from crispedit.generation import answers
from crispedit.rows import Prompter
from crispedit.wild import in_context


@pytest.fixture(scope="module")
def prompter():
    from crispedit.models import load_model

    loaded = load_model("bundled")
    return loaded.model, Prompter.of(loaded.model, loaded.tokenizer)


def test_its_size_and_shape(bundled):
    files = list(MODEL_DIRECTORY.iterdir())
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert [file.suffix for file in files if file.stat().st_size > 1e6] == [".safetensors"]
    assert bundled.stored_dtype == torch.float16
    assert 2e6 <= sum(p.numel() for p in bundled.model.parameters()) <= 7e6
    assert bundled.model.config.model_type == "llama"
    assert bundled.tokenizer.pad_token_id is None


def test_every_digit_is_a_token(bundled):
    tokens = bundled.tokenizer.tokenize("In 1957 there were 38 coins.")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("195738")
    text = "Ærøskøbing, naïve 東京 🙂"
    assert bundled.tokenizer.decode(bundled.tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_it_knows_its_world_in_words_not_seen_with_the_fact(prompter):
    """Questions alone, in context, and clozes: a sample here, all in docs/decisions.md."""
    facts = random.Random(7).sample(world.facts(), 300)
    model, ask = prompter
    known = {}
    for index, context in ((0, "no_context"), (0, "qa_context"), (1, "no_context")):
        given = answers(model, ask, [in_context(f.prompt(f.unseen_prompts[index]), context) for f in facts])
        right = sum(answer.text == fact.object for answer, fact in zip(given, facts, strict=True))
        known[index, context] = 100 * right / len(facts)
    assert min(known.values()) >= 95, known


def test_it_has_its_abilities(prompter):
    scores = bundled_tasks(*prompter, count=200)
    assert set(scores) == set(abilities.FAMILIES)
    assert scores["arithmetic"] >= 90
    assert scores["instructions"] >= 90
    assert scores["multiple_choice"] >= 90
    assert scores["true_false"] >= 90
    assert scores["prose"] >= 70


def test_its_code_makes_such_a_model(tmp_path, monkeypatch):
    """The smoke-sized run: same seed, same bytes; the stored model loads and is scored."""
    command = ["-m", "crispedit.bundled.train", "--smoke", "--out"]
    found = subprocess.run(
        [sys.executable, *command, str(tmp_path / "one")], capture_output=True, text=True, check=True
    )
    assert set(json.loads(found.stdout)) == {"questions", "questions_in_context", "clozes", *abilities.PROMPTED}
    monkeypatch.setattr(sys, "argv", [*command[1:], str(tmp_path / "two")])
    monkeypatch.setattr(train, "report", lambda *of_model: {})
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        train.main()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_training_documents_end_with_the_end_token_and_weigh_the_answer():
    tokenizer = train.train_tokenizer(500)
    ids, weights = next(train.batches(tokenizer, 0))
    assert ids.shape == weights.shape
    for row, of_row in zip(ids.tolist(), weights.tolist(), strict=True):
        length = max(i for i, weight in enumerate(of_row) if weight) + 1
        assert row[0] == tokenizer.bos_token_id
        assert row[length - 1] == tokenizer.eos_token_id
        assert set(row[length:]) <= {tokenizer.eos_token_id}
        assert of_row[0] == 0
        assert of_row[length - 1] in (1, train.TEXT_WEIGHT)
