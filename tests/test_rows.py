"""Rows and prompts as tokens, compared with ids written out by hand."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crispedit.edits import Edit, edits_from_rows
from crispedit.errors import ConfigError, EditsError, ModelError
from crispedit.forward import collate
from crispedit.rows import EditRow, Prompter
from families import CHARACTERS, CHATML, LLAMA_3, SPECIAL, tiny_tokenizer

EDIT = Edit(prompt="Ada is in", target="St. Louis", row=1)
TALK = (("user", "Hi"), ("assistant", "Hello"), ("user", "Where is Ada?"))


def ids(*parts):
    """Special tokens whole, and all other text one character to a token."""
    names = [*SPECIAL, *CHARACTERS]
    spelled = [[part] if part in SPECIAL else part.replace("\n", "Ċ").replace(" ", "Ġ") for part in parts]
    return tuple(names.index(token) for part in spelled for token in part)


# --- plain rows -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ends", [False, True], ids=["", "tokenizer ends texts"])
@pytest.mark.parametrize("begins", [False, True], ids=["", "tokenizer begins texts"])
@pytest.mark.parametrize("eos", [False, True], ids=["no eos", "eos"])
def test_a_plain_row_is_prompt_blank_target_eos(begins, ends, eos):
    prompter = Prompter(tiny_tokenizer(begins=begins, ends=ends), eos=eos)
    prompt = ids(*["<s>"] * begins, "Ada is in")
    assert prompter.prompt("Ada is in") == prompt  # what a tokenizer ends texts with is no part of a prompt
    assert prompter.row(EDIT) == EditRow(prompt + ids(" St. Louis", *["</s>"] * eos), len(prompt))


MERGED = len(SPECIAL) + len(CHARACTERS)  # the id of the first merge


@pytest.mark.parametrize(
    ("merges", "prompt", "target", "expected"),
    [  # the row, and how many of its tokens are prompt
        ([("s", "Ġ")], "It is", "so", ((1, *ids("It i"), MERGED, *ids("so", "</s>")), 5)),
        ([("Ġ", "s")], "It is", "so", ((1, *ids("It is"), MERGED, *ids("o", "</s>")), 6)),
        ([("s", "Ġ"), ("sĠ", "s")], "s", "so", ((1, MERGED + 1, *ids("o", "</s>")), 1)),
    ],
    ids=["with the prompt's end", "with the blank", "all but one letter"],
)
def test_a_token_that_the_target_shares_with_the_prompt_carries_loss(merges, prompt, target, expected):
    tokenizer = tiny_tokenizer(merges=tuple(merges))
    row = Prompter(tokenizer).row(Edit(prompt=prompt, target=target, row=1))
    assert row == EditRow(*expected)
    assert tokenizer.decode(row.ids, skip_special_tokens=True) == f"{prompt} {target}"


def test_the_first_token_of_a_row_carries_no_loss():
    """Without ``<s>`` a target may merge with the first token, which nothing predicts."""
    tokenizer = tiny_tokenizer(merges=(("s", "Ġ"),), begins=False)
    row = Prompter(tokenizer).row(Edit(prompt="s", target="so", row=1))
    assert row == EditRow((MERGED, *ids("so", "</s>")), 1)
    assert collate([row]).labels.tolist() == [*ids("so", "</s>")]


def test_a_target_without_a_token_of_its_own_is_refused():
    tokenizer = tiny_tokenizer(merges=(("s", "Ġ"), ("sĠ", "o")), begins=False)
    with pytest.raises(EditsError, match=r"^row 3: the target 'o' has no token of its own"):
        Prompter(tokenizer).row(Edit(prompt="s", target="o", row=3))


@pytest.mark.parametrize(("context", "fits"), [(None, True), (21, True), (20, False)])
def test_a_row_longer_than_the_context_is_refused_with_its_number(context, fits):
    edits = edits_from_rows([{"prompt": "A", "target": "B"}, {"prompt": EDIT.prompt, "target": EDIT.target}])
    prompter = Prompter(tiny_tokenizer())
    if fits:
        assert [len(row.ids) for row in prompter.rows(edits, context)] == [5, 21]
    else:
        with pytest.raises(EditsError, match=r"^row 2 has 21 tokens; the model's context is 20"):
            prompter.rows(edits, context)


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=8).map(str.strip).filter(bool)
TOKENIZERS = {
    "merging": tiny_tokenizer(merges=(("e", "Ġ"), ("Ġ", "a"), ("eĠ", "a"))),
    "bare": tiny_tokenizer(merges=(("e", "Ġ"),), begins=False),
    "chatml": tiny_tokenizer(chat_template=CHATML),
    "llama 3": tiny_tokenizer(chat_template=LLAMA_3),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None, database=None)
@example(prompt="e", target="0", eos=False)
@given(prompt=TEXT, target=TEXT, eos=st.booleans())
def test_every_row_says_prompt_and_target_and_something_of_it_is_learned(name, prompt, target, eos):
    prompter = Prompter(TOKENIZERS[name], eos=eos)
    row = prompter.row(Edit(prompt=prompt, target=target, row=1))
    asked, taught = prompter.prompt(prompt), row.ids[row.prompt_length :]
    assert 1 <= row.prompt_length < len(row.ids) - eos
    first = (
        row.prompt_length == 1
    )  # nothing predicts a first token, so it is prompt even where the target merges into it
    assert first or asked[: row.prompt_length] == row.ids[: row.prompt_length]
    assert prompter.tokenizer.decode(taught, skip_special_tokens=True).endswith(target)
    assert (taught[-1] in prompter.end_tokens) == eos
    assert collate([row]).labels.tolist() == [*taught]


# --- chat -------------------------------------------------------------------------------------------------------------
CHATML_PROMPT = ("<|im_start|>", "user\nAda is in", "<|im_end|>", "\n", "<|im_start|>", "assistant\n")
LLAMA_3_HEADS = [("<|start_header_id|>", role, "<|end_header_id|>", "\n\n") for role in ("user", "assistant")]
LLAMA_3_PROMPT = ("<s>", *LLAMA_3_HEADS[0], "Ada is in", "<|eot_id|>", *LLAMA_3_HEADS[1])
BRACKETS = "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + 'END' }}{% endfor %}"
TEMPLATES = {  # the template, a prompt in it, and the token that ends a turn
    "chatml": (CHATML, CHATML_PROMPT, "<|im_end|>"),
    "llama 3": (LLAMA_3, LLAMA_3_PROMPT, "<|eot_id|>"),
    "eos": (BRACKETS.replace("END", "</s>"), ("[Ada is in]",), "</s>"),
    "phi 3": (BRACKETS.replace("END", "<|im_end|></s>"), ("[Ada is in]",), "<|im_end|>"),
    "no end": (BRACKETS.replace("END", ""), ("[Ada is in]",), "</s>"),
}


@pytest.mark.parametrize("eos", [False, True], ids=["no eos", "eos"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_row_begins_as_evaluation_asks_and_ends_its_turn(name, eos):
    template, prompt, turn_end = TEMPLATES[name]
    prompter = Prompter(tiny_tokenizer(chat_template=template), eos=eos)
    assert prompter.prompt("Ada is in") == ids(*prompt)
    assert prompter.row(EDIT) == EditRow(ids(*prompt, "St. Louis", *[turn_end] * eos), len(ids(*prompt)))
    assert prompter.end_tokens == tuple(sorted({*ids("</s>"), *ids(turn_end)}))


@pytest.mark.parametrize(
    ("chat", "template", "through_template"),
    [("auto", CHATML, True), ("on", CHATML, True), ("off", CHATML, False), ("auto", None, False), ("off", None, False)],
)
def test_chat_says_whether_prompts_go_through_the_template(chat, template, through_template):
    prompter = Prompter(tiny_tokenizer(chat_template=template), chat=chat)
    assert prompter.prompt("Ada is in") == ids(*(CHATML_PROMPT if through_template else ("<s>", "Ada is in")))
    assert prompter.end_tokens == (ids("</s>", "<|im_end|>") if through_template else ids("</s>"))


@pytest.mark.parametrize("system", [(), (("system", "Be brief."),)], ids=["", "system"])
def test_a_conversation_is_taught_and_asked_in_full(system):
    messages = [{"role": role, "content": text} for role, text in (*system, *TALK, ("assistant", "Rome"))]
    (edit,) = edits_from_rows([{"messages": messages}])
    prompter = Prompter(tiny_tokenizer(chat_template=CHATML))
    turns = [("<|im_start|>", f"{role}\n{text}", "<|im_end|>", "\n") for role, text in (*system, *TALK)]
    prompt = ids(*(part for turn in turns for part in turn), "<|im_start|>", "assistant\n")
    assert prompter.prompt(edit.turns) == prompt
    assert prompter.row(edit) == EditRow(prompt + ids("Rome", "<|im_end|>"), len(prompt))


@pytest.mark.parametrize("template", [None, CHATML])
def test_without_a_template_a_conversation_has_one_turn(template):
    prompter = Prompter(tiny_tokenizer(chat_template=template), chat="off")
    assert prompter.prompt(TALK[2:]) == prompter.prompt("Where is Ada?")
    single = prompter.row(Edit(prompt="Where is Ada?", target="Rome", turns=TALK[2:], row=1))
    assert single == prompter.row(Edit(prompt="Where is Ada?", target="Rome", row=1))
    for ask in (lambda: prompter.prompt(TALK), lambda: prompter.row(Edit(prompt="?", target="Rome", turns=TALK))):
        with pytest.raises(EditsError, match="several turns needs a chat template"):
            ask()


def test_the_model_says_where_else_it_stops():
    class Model:
        generation_config = type("", (), {"eos_token_id": [7, 4]})

    assert Prompter.of(Model, tiny_tokenizer()).end_tokens == (2, 4, 7)
    Model.generation_config.eos_token_id = 7
    assert Prompter.of(Model, tiny_tokenizer()).end_tokens == (2, 7)
    Model.generation_config.eos_token_id = None
    assert Prompter.of(Model, tiny_tokenizer(eos=False), eos=False).end_tokens == ()


@pytest.mark.parametrize(
    ("tokenizer", "options", "error", "message"),
    [
        ({}, {"chat": "on"}, ConfigError, "chat is on, but this model's tokenizer has no chat template"),
        ({}, {"chat": "of"}, ConfigError, r"chat is 'of'; it must be auto, on or off \(did you mean 'off'"),
        ({"eos": False}, {}, ConfigError, "has no end-of-sequence token; use --no-eos"),
        ({"chat_template": "{{ raise_exception('no') }}"}, {}, ModelError, "cannot render a row: no; use --chat off"),
        ({"chat_template": "{% for %}"}, {}, ModelError, "cannot render a row: .*; use --chat off"),
    ],
)
def test_what_cannot_be_prompted_is_refused(tokenizer, options, error, message):
    with pytest.raises(error, match=message) as refused:
        Prompter(tiny_tokenizer(**tokenizer), **options)
    assert "\n" not in str(refused.value)
