"""Free greedy answers: against a loop without batches, padding or cache, and from models with a script."""

from itertools import pairwise

import pytest
import torch

from crispedit import generation
from crispedit.errors import EditsError
from crispedit.rows import Prompter
from families import CHATML, FAMILIES, tiny_model, tiny_tokenizer

PROMPTS = ["The sky is", "A", "Two and two make", "Who is Ada? She is", "A", "xyzzy!", "?", "to be or not to be"]


def answers(*arguments, **options):
    """The texts of answers."""
    return [answer.text for answer in generation.answers(*arguments, **options)]


@torch.no_grad()
def one_by_one(model, prompter, prompt, max_new_tokens):
    """The answer to one prompt, from its definition."""
    ids = list(prompter.prompt(prompt))
    start, text = len(ids), ""
    while len(ids) - start < max_new_tokens and "\n" not in text:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in prompter.end_tokens:
            break
        text = prompter.tokenizer.decode(ids[start:], skip_special_tokens=True).lstrip()
    return text.split("\n")[0].strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_batched_answers_equal_answers_one_by_one(name):
    model, prompter = tiny_model(name), Prompter(tiny_tokenizer(pad=False))
    expected = [one_by_one(model, prompter, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) > len(PROMPTS) // 2  # they differ, so that a mix-up would show
    for batch_tokens in (4096, 40, 1):
        assert answers(model, prompter, PROMPTS, max_new_tokens=12, batch_tokens=batch_tokens) == expected


# --- models that say what they are told -------------------------------------------------------------------------------
def scripted(tokenizer, *scripts):
    """A model in which every token is followed by what follows it first in the scripts."""
    vocab = len(tokenizer)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    model = tiny_model("llama", vocab_size=vocab, hidden_size=vocab, num_hidden_layers=1, **heads)
    following = torch.zeros(vocab, vocab)
    for ids in tokenizer(list(scripts), add_special_tokens=False)["input_ids"]:
        for token, successor in pairwise(ids):
            if not following[:, token].any():
                following[successor, token] = 1
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1) if "norm" in name else parameter.data.zero_()
    model.model.embed_tokens.weight.data = torch.eye(vocab)
    model.lm_head.weight.data = following
    return model


def ask(script, *, tokenizer=None, **options):
    """The answer to the first character of a script, and how many tokens it has."""
    tokenizer = tokenizer or tiny_tokenizer()
    (answer,) = generation.answers(scripted(tokenizer, script), Prompter(tokenizer), [script[0]], **options)
    return answer.text, len(answer.ids)


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("?Rome</s>!", {}, ("Rome", 5)),
        ("? Rome</s>!", {}, ("Rome", 6)),
        ("?</s>!", {}, ("", 1)),
        ("?Rome\n!", {}, ("Rome", 5)),
        ("?\nRome\n!", {}, ("Rome", 6)),
        ("? \nRome</s>", {}, ("Rome", 7)),
        ("?\nRome!</s>", {"max_new_tokens": 4}, ("Rom", 4)),
        ("?abca", {"max_new_tokens": 8}, ("abcabcab", 8)),
        ("?abca", {}, ("abc" * 13 + "a", 40)),
        ("?St. Louis</s>", {}, ("St. Louis", 10)),
        ("?St. Louis</s>", {"stop_at_period": True}, ("St", 10)),
    ],
)
def test_an_answer_ends_at_the_end_of_sequence_or_its_line(script, options, expected):
    assert ask(script, **options) == expected


@pytest.mark.parametrize(
    ("merges", "script", "expected"),
    [  # a line break inside a token
        ([("Ċ", "R")], "?\nRome\n!", ("Rome", 5)),
        ([("Ċ", "R"), ("e", "Ċ")], "?\nRome\n!", ("Rome", 4)),
        ([("Ċ", "P")], "?Rome\nP", ("Rome", 5)),
        ([("Ċ", "Ċ")], "?\n\nRome</s>", ("Rome", 6)),
        ([("R", "Ċ"), ("RĊ", "o")], "?R\nome</s>", ("R", 1)),
    ],
)
def test_a_line_break_ends_an_answer_unless_it_leads(merges, script, expected):
    assert ask(script, tokenizer=tiny_tokenizer(merges=tuple(merges))) == expected


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", "<|eot_id|>"])
def test_a_chat_answer_ends_with_its_turn(end):
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    model = scripted(tokenizer, f"\nRome{end}!")  # a prompt ends with "assistant\n"
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    prompts = ["Where?", (("user", "Hi"), ("assistant", "Hello"), ("user", "Where?"))]
    assert answers(model, Prompter.of(model, tokenizer), prompts) == ["Rome", "Rome"]


def test_every_prompt_is_answered_in_order_and_each_different_one_once():
    tokenizer = tiny_tokenizer()
    model, said = scripted(tokenizer, "?Rome</s>", "!a.</s>", "#x\n"), []
    prompts = ["wh?", "#", "!", "#", "where?", "#", "wh?"]
    found = answers(model, Prompter(tokenizer), prompts, batch_tokens=14, progress=lambda *what: said.append(what))
    assert found == ["Rome", "x", "a.", "x", "Rome", "x", "Rome"]
    assert said == [("answers", 3, 4), ("answers", 4, 4)]  # of 2, 2, 4 and 7 tokens, the longest has its own batch
    assert answers(model, Prompter(tokenizer), []) == []


# --- what a checkpoint brings along -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0},
        {"do_sample": True, "temperature": 9.0, "top_k": 5},
        {"min_new_tokens": 12},
        {"max_length": 3},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
    ],
    ids=lambda own: next(iter(own)),
)
def test_answers_are_greedy_whatever_the_checkpoint_would_do(own):
    model, prompter = tiny_model("llama"), Prompter(tiny_tokenizer())
    expected = answers(model, prompter, PROMPTS)
    config = model.generation_config
    config.update(**own)
    assert answers(model, prompter, PROMPTS) == expected
    assert model.generation_config is config  # it is saved with the model
    assert all(getattr(config, name) == value for name, value in own.items())


def test_an_answer_ends_where_the_context_does():
    """GPT-2 has no position after its last."""
    model, prompter = tiny_model("gpt2", max_position_embeddings=24, eos_token_id=None), Prompter(tiny_tokenizer())
    model.generation_config.eos_token_id = None
    for length in (1, 10, 21, 22):
        prompt = "x" * length
        assert answers(model, prompter, [prompt]) == [one_by_one(model, prompter, prompt, 24 - 1 - length)]
    with pytest.raises(EditsError, match="a prompt has 24 tokens; the model's context is 24: shorten it"):
        answers(model, prompter, ["short", "x" * 23])
