"""Free greedy answers: against a loop without batches, padding or cache, and from models with a script."""

import random
from itertools import pairwise

import pytest
import torch

from crispedit import generation
from crispedit.errors import EditsError
from crispedit.judge import Case, is_exact
from crispedit.models import CACHE
from crispedit.rows import Prompter
from families import AWKWARD, CHATML, EXPERTS, FAMILIES, tiny_model, tiny_tokenizer

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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*FAMILIES, *AWKWARD, *EXPERTS])
def test_batched_answers_equal_answers_one_by_one(name, side):
    """Whatever side the tokenizer pads on, and whether it has a token to do so or not."""
    tokenizer = tiny_tokenizer(pad=side == "right")
    tokenizer.padding_side = side
    model, prompter = tiny_model(name), Prompter(tokenizer)
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


def published(script, tokenizer):
    """The answer by the published rule: transformers' own stop strings, and each of them taken off the end once."""
    eos = tokenizer.eos_token
    out = scripted(tokenizer, script).generate(
        **tokenizer(script[0], return_tensors="pt"),
        max_new_tokens=generation.MAX_NEW_TOKENS,
        do_sample=False,
        use_cache=False,
        stop_strings=[".", "\n", eos],
        tokenizer=tokenizer,
    )
    text = tokenizer.decode(out[0, 2:])  # after <s> and the first character
    for end in (".", "\n", eos):
        text = text.removesuffix(end)
    return text


@pytest.mark.parametrize(
    ("merges", "script", "expected"),
    [
        ([], "?Rome</s>", "Rome"),
        ([], "? Rome.</s>", "Rome"),
        ([], "?St. Louis</s>", "St"),
        ([], "?Rome\n.", "Rome"),
        ([], "?\nRome</s>", ""),  # ours is "Rome"
        ([], "?.Rome</s>", ""),
        ([], "?abca", "abc" * 13 + "a"),
        ([(".", "S")], "?U.S</s>", "U.S"),  # a period is not at the end of its token
        ([(".", "Ċ")], "?Rome.\n", "Rome."),  # a period is not at the end of the text
        ([("Ċ", "Ċ")], "?Rome\n\n", "Rome"),
        ([("Ċ", "Q")], "?Rome\nQ", "Rome\nQ"),
        ([(".", "."), ("..", ".")], "?So...</s>", "So.."),
    ],
)
def test_the_published_rule_leaves_what_it_does_in_transformers(merges, script, expected):
    """Blanks around the text are no part of what is judged."""
    tokenizer = tiny_tokenizer(merges=tuple(merges))
    assert ask(script, tokenizer=tokenizer, stop_at_period=True)[0] == expected
    assert published(script, tokenizer).strip() == expected


WITH_PERIOD = {  # the nine targets of the WikiBigEdit file that have one, and what the published rule leaves of them
    "Chittoor V. Ramamoorthy": "Chittoor V",
    "St. Eugenia's Church": "St",
    "Harry Bernsen Jr.": "Harry Bernsen Jr",
    "C. J. van Rijsbergen": "C",
    "Robert G. Wright": "Robert G",
    "Larry W. Finger": "Larry W",
    "2. Bundesliga": "2",
    "Creative Commons Attribution 4.0 International": "Creative Commons Attribution 4",
    "St. Luke's Hospital": "St",
}


def test_of_nine_real_targets_the_published_rule_can_judge_one(bundled):
    """A model that says exactly what it was taught is right in all of them by our rule."""
    tokenizer, rule = bundled.tokenizer, {}
    reader = generation._Reader(Prompter(tokenizer))
    for target, left in WITH_PERIOD.items():
        ids = tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
        row = generation._Row((), generation.MAX_NEW_TOKENS)
        reader.add(row, [*ids, tokenizer.eos_token_id])
        rule[target] = [reader.answer(row, stop_at_period).text for stop_at_period in (False, True)]
        assert rule[target] == [target, left]
    assert [target for target, (_, left) in rule.items() if is_exact(Case("", target, left))] == ["Harry Bernsen Jr."]


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


# --- drafts -----------------------------------------------------------------------------------------------------------
def broken(ids, rng, end, line):
    """Guesses at an answer of every kind: right, wrong from the first, wrong later, too short, too long, with lines."""
    other = [token for token in range(8, 100) if token not in ids]
    middle = len(ids) // 2
    return [
        ids,
        (rng.choice(other), *ids[1:]),
        (*ids[:middle], rng.choice(other), *ids[middle + 1 :]),
        ids[:middle],
        (*ids, *rng.choices(other, k=30)),
        (),
        (line, *ids),
        (*ids[:middle], line, *ids[middle:]),
        (*ids[:middle], end),
        (*ids[:-1], end, *ids),
        tuple(rng.choices(other, k=rng.randint(1, 60))),
    ]


@pytest.mark.parametrize("few", [8, 32])
@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "olmoe"])
def test_drafts_change_no_answer(name, few, monkeypatch):
    """Against decoding one token of one row at a time; the sliding windows (16) are shorter than some rows."""
    model, tokenizer = tiny_model(name), tiny_tokenizer(pad=False)
    end, line = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Ċ")
    if (head := model.get_output_embeddings()).bias is None:
        head.weight.data[[end, line]] *= 2  # so that some answers end before the limit
    monkeypatch.setattr(generation, "FEW", few)
    prompter, rng = Prompter(tokenizer), random.Random(name)
    prompts = [*PROMPTS, "Two and two makes", "Who is Ada? She was", "xyz"]
    expected = [one_by_one(model, prompter, prompt, 12) for prompt in prompts]
    plain = generation.answers(model, prompter, prompts, max_new_tokens=12)
    assert [answer.text for answer in plain] == expected
    kinds = len(broken((), rng, end, line))
    for kind in range(kinds + 4):
        drafts = []
        for answer in plain:
            some = broken(answer.ids, rng, end, line)
            drafts.append([some[kind]] if kind < kinds else rng.sample(some, k=kind - kinds))
        assert generation.answers(model, prompter, prompts, drafts=drafts, max_new_tokens=12) == plain, kind


def counted(model):
    """The numbers of prompts and of tokens per prompt that a model is called with, call by call."""
    calls, forward = [], model.forward
    model.forward = lambda **inputs: calls.append(tuple(inputs["input_ids"].shape)) or forward(**inputs)
    return calls


def test_right_drafts_leave_nothing_to_generate(monkeypatch):
    model, prompter = tiny_model("llama"), Prompter(tiny_tokenizer())
    plain = generation.answers(model, prompter, PROMPTS)
    monkeypatch.setattr(model, "generate", None)
    said = []
    drafts = [[answer.ids] for answer in plain]
    again = generation.answers(model, prompter, PROMPTS, drafts=drafts, progress=lambda *what: said.append(what))
    assert again == plain
    assert said == [("answers", 7, 7)]


def test_generating_goes_on_where_a_draft_ends():
    """A draft that is right for 30 tokens saves 31: the model's own next choice is known too."""
    model, prompter = tiny_model("llama", eos_token_id=None), Prompter(tiny_tokenizer())
    (plain,) = generation.answers(model, prompter, ["?"])
    assert len(plain.ids) == 40
    calls = counted(model)
    (found,) = generation.answers(model, prompter, ["?"], drafts=[[(*plain.ids[:30], plain.ids[30] + 1)]])
    assert found == plain
    assert calls[-9:] == [(1, 2 + 31)] + 8 * [(1, 1)]


def test_drafts_of_every_asking_of_a_prompt_are_tried():
    model, prompter = tiny_model("llama"), Prompter(tiny_tokenizer())
    plain = generation.answers(model, prompter, PROMPTS)
    drafts = [[] for _ in PROMPTS]
    drafts[4] = [(9, 9), plain[1].ids]  # the same prompt as the second
    calls = counted(model)
    assert generation.answers(model, prompter, PROMPTS, drafts=drafts) == plain
    assert max(rows for rows, tokens in calls if tokens > 1) == 6  # of seven different prompts


def test_bad_drafts_are_given_up(monkeypatch):
    monkeypatch.setattr(generation, "TRIED", 4)
    model, prompter = tiny_model("llama"), Prompter(tiny_tokenizer())
    prompts = [character * length for character in "abcd" for length in (1, 2, 3, 4)]
    plain = generation.answers(model, prompter, prompts)
    tried = []
    choices = generation._first_choices
    monkeypatch.setattr(generation, "_first_choices", lambda rows, some: tried.append(len(some)) or choices(rows, some))
    for right, expected in ((0.0, [4]), (0.25, [4]), (0.5, [4, 12]), (1.0, [4, 12])):
        tried.clear()
        drafts = [[answer.ids if number % 16 < right * 16 else (9,)] for number, answer in enumerate(plain)]
        assert generation.answers(model, prompter, prompts, drafts=drafts) == plain
        assert tried == expected


def test_there_is_a_list_of_drafts_for_every_prompt():
    with pytest.raises(ValueError, match="shorter"):
        generation.answers(tiny_model("llama"), Prompter(tiny_tokenizer()), PROMPTS, drafts=[[]])


# --- rows that have ended ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_have_ended_leave_the_batch(name):
    tokenizer = tiny_tokenizer()
    model, prompter = tiny_model(name), Prompter(tokenizer)
    if (head := model.get_output_embeddings()).bias is None:
        head.weight.data[tokenizer.eos_token_id] *= 3
    prompts = [first + second for first in "abcdefgh" for second in "ijkl"]
    expected = [one_by_one(model, prompter, prompt, 30) for prompt in prompts]
    calls = counted(model)
    found = generation.answers(model, prompter, prompts, max_new_tokens=30)
    assert [answer.text for answer in found] == expected
    lengths = [len(answer.ids) for answer in found]
    assert len(set(lengths)) > 2
    for step, (rows, tokens) in enumerate(calls):
        assert tokens == (1 if step else 3)
        going = sum(length > step for length in lengths)
        assert going <= rows
        assert rows * generation.STAY <= going or going == len(prompts)


def test_a_model_that_keeps_no_cache_is_asked_anew():
    model, prompter = tiny_model("llama"), Prompter(tiny_tokenizer())
    expected = generation.answers(model, prompter, PROMPTS)
    generate = model.generate

    def forgetful(**inputs):
        assert inputs[CACHE] is None
        out = generate(**inputs)
        out[CACHE] = None
        return out

    model.generate = forgetful
    assert generation.answers(model, prompter, PROMPTS) == expected


def test_a_short_row_has_its_whole_context_beside_a_long_one():
    model, prompter = tiny_model("gpt2", max_position_embeddings=24, eos_token_id=None), Prompter(tiny_tokenizer())
    prompts = ["x" * length for length in (1, 10, 21, 22)]
    expected = [one_by_one(model, prompter, prompt, 24 - 1 - len(prompt)) for prompt in prompts]
    assert answers(model, prompter, prompts) == expected
    drafts = [[answer.ids] for answer in generation.answers(model, prompter, prompts)]
    assert answers(model, prompter, prompts, drafts=[[(*some[0], 9)] for some in drafts]) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_head_is_given_contiguous_hidden_states(name):
    """Of a slice torch makes a product per row, each with a copy of the head."""
    model, seen = tiny_model(name), []
    prompter = Prompter(tiny_tokenizer(), eos=False)
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    generation.answers(model, prompter, ["a b c", "b c"], max_new_tokens=3)
    handle.remove()
    assert any(hidden.shape[0] == 2 and hidden.shape[1] == 1 for hidden in seen)
    plain = [hidden.is_contiguous() for hidden in seen]
    with generation.contiguous_head(model):
        model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        seen.clear()
        generation.answers(model, prompter, ["a b c", "b c"], max_new_tokens=3)
    assert not all(plain)
    assert all(hidden.is_contiguous() for hidden in seen)
