"""Reading capability texts, dividing them, and batches of their tokens."""

import json

import pytest
import torch
from transformers import PretrainedConfig

from crispedit.errors import TextsError
from crispedit.texts import TokenBatch, load_texts, next_tokens, split_texts


class Model:
    """As much of a model as batching looks at: a context of ten tokens."""

    config = PretrainedConfig(max_position_embeddings=10, vocab_size=100, intermediate_size=8)


class Words:
    """A tokenizer of one token per word, with no padding token."""

    pad_token_id, eos_token_id = None, 0

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\ntext\n\n\n\ntwo\n"),
        ("a.json", json.dumps(["one\ntext", "two"])),
        ("a.json", json.dumps([{"text": "one\ntext", "source": "x"}, {"text": "two"}])),
        ("a.jsonl", '{"text": "one\\ntext"}\n\n"two"\n'),
    ],
)
def test_texts_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert load_texts(tmp_path / name) == ["one\ntext", "two"]


def test_a_seeded_fifth_is_held_out():
    texts = [f"text {i}" for i in range(100)]
    one, same, other = split_texts(texts), split_texts(texts), split_texts(texts, seed=1)
    assert len(one.held_out) == 20
    assert len(one.fit) == 80
    assert set(one.fit) | set(one.held_out) == set(texts)
    assert one == same
    assert one.sha256 == same.sha256 != other.sha256
    assert len(split_texts(texts, samples=10).fit) == 8
    assert len(split_texts(["a", "b", "a", " "]).fit) == 1


def test_batches_are_bucketed_cut_and_padded_with_eos():
    from crispedit.texts import text_batches

    batches = text_batches(Model(), Words(), ["aa bb cc", "a", "ddd eee", "f " * 50], batch_tokens=6)
    assert [batch.ids.shape for batch in batches] == [(2, 3), (1, 10)]
    assert batches[0].ids.tolist() == [[3, 3, 0], [2, 2, 2]]
    assert batches[0].mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    with pytest.raises(TextsError, match="no capability text has two tokens"):
        text_batches(Model(), Words(), ["a", "b"])


def test_batches_are_smaller_where_the_model_is_wide_or_its_vocabulary_large():
    from crispedit.texts import text_batches

    texts = ["a b c"] * 40
    sizes = {}
    for name, config in {
        "small": {"vocab_size": 100, "intermediate_size": 8},
        "wide": {"vocab_size": 100, "intermediate_size": 2**17},
        "large vocabulary": {"vocab_size": 2**22, "intermediate_size": 8},
    }.items():
        model = Model()
        model.config = PretrainedConfig(max_position_embeddings=10, **config)
        sizes[name] = max(batch.ids.numel() for batch in text_batches(model, Words(), texts))
    assert sizes == {"small": 120, "wide": 63, "large vocabulary": 30}


def test_next_tokens_leave_out_padding_and_the_last_token():
    batch = TokenBatch(ids=torch.tensor([[5, 6, 0], [7, 8, 9]]), mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert next_tokens(batch).tolist() == [[6, -100, -100], [8, 9, -100]]
