"""Teacher-forced scores: which tokens are read, what is made of them, and which definition of locality applies.

That the scores are right is shown in ``test_second_implementation.py``.
"""

import pytest
import torch

from crispedit.edits import Edit, EditSet, Locality, edits_from_rows
from crispedit.errors import EditsError
from crispedit.rows import EditRow, Prompter
from crispedit.teacher_forced import continuations, locality_choices, locality_of, read_rows, teacher_force
from families import CHATML, FAMILIES, LLAMA_3, tiny_model, tiny_tokenizer

EDIT = Edit(
    prompt="Who?",
    target="Ann",
    rephrases=("Which one?", "What person?"),
    locality=(Locality(prompt="Where?", answer="Here"), Locality(prompt="When?", answer=None)),
    row=7,
)


def words(tokenizer, row):
    """The tokens of a row up to its target, and those of its target."""
    tokens = tokenizer.convert_ids_to_tokens(list(row.ids))
    return "".join(tokens[: row.prompt_length]), "".join(tokens[row.prompt_length :])


# --- which tokens are read --------------------------------------------------------------------------------------------
def test_a_target_is_read_with_the_space_before_it_and_without_an_end():
    tokenizer = tiny_tokenizer()
    asked = continuations(Prompter(tokenizer, eos=False), [EDIT])
    assert [(one.edit, one.kind, *words(tokenizer, one.expected), one.rival) for one in asked] == [
        (0, "reliability", "<s>Who?", "ĠAnn", None),
        (0, "generalization", "<s>WhichĠone?", "ĠAnn", None),
        (0, "generalization", "<s>WhatĠperson?", "ĠAnn", None),
        (0, "locality", "<s>Where?", "ĠHere", None),  # and nothing where no answer is known
    ]


def test_a_token_that_target_and_prompt_share_is_the_targets():
    tokenizer = tiny_tokenizer(merges=(("?", "Ġ"), ("?Ġ", "A")))
    one = continuations(Prompter(tokenizer, eos=False), [EDIT])[0]
    assert words(tokenizer, one.expected) == ("<s>Who", "?ĠAnn")


@pytest.mark.parametrize("template", [CHATML, LLAMA_3])
def test_in_a_chat_the_answer_is_the_assistants_turn_without_its_end(template):
    tokenizer = tiny_tokenizer(chat_template=template)
    prompter = Prompter(tokenizer, eos=False)
    turns = (("system", "Be brief."), ("user", "Who?"))
    for edit in (EDIT, Edit(prompt="Who?", target="Ann", turns=turns)):
        row = continuations(prompter, [edit])[0].expected
        assert row.ids[: row.prompt_length] == prompter.prompt(edit.turns or edit.prompt)
        assert words(tokenizer, row)[1] == "Ann"


def test_a_row_beyond_the_context_is_named():
    with pytest.raises(EditsError, match="row 7 has 15 tokens; the model's context is 12: shorten it"):
        continuations(Prompter(tiny_tokenizer(), eos=False), [EDIT], 12)


# --- what is made of them ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*FAMILIES, "mixtral"])
def test_rows_that_share_tokens_are_read_as_each_alone(name):
    """Against the whole model on single rows, some longer than a sliding window (16); NLL to float32's rounding."""
    model, generator = tiny_model(name), torch.Generator().manual_seed(0)
    ids = torch.randint(8, 100, (40, 30), generator=generator).tolist()
    rows = [
        EditRow((1, *ids[number % 5][:4], *row[: 3 + number % 20]), 3 + number % 5) for number, row in enumerate(ids)
    ]
    read = read_rows(model, [*rows, *rows[::7]])
    assert list(read) != rows  # they are read in another order
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, row.prompt_length - 1 : -1]
        labels = torch.tensor(row.ids[row.prompt_length :])
        assert read[row].choices == tuple(logits.argmax(-1).tolist())
        assert read[row].nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_a_model_agrees_with_itself_and_less_with_another():
    tokenizer = tiny_tokenizer()
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    edits = [
        EDIT,
        Edit(prompt="a", target="b"),
        Edit(prompt="c", target="d", locality=(Locality(prompt="e", answer="efgh"),)),
    ]
    found = teacher_force(model, tokenizer, edits, base=locality_choices(model, tokenizer, edits))
    assert found.beside == {"agreement": {0: 1.0, 2: 1.0}, "efficacy": {}, "paraphrase_efficacy": {}}
    base = locality_choices(other, tokenizer, edits)
    assert sum(teacher_force(model, tokenizer, edits, base=base).beside["agreement"].values()) < 1
    assert teacher_force(model, tokenizer, edits).beside["agreement"] == {}


def test_what_is_not_asked_has_no_score():
    found = teacher_force(tiny_model("llama"), tiny_tokenizer(), [Edit(prompt="Why?", target="So")])
    assert found.items["generalization"] == found.items["locality"] == {}
    assert set(found.items["reliability"]) == {0}
    assert found.details() == {
        "locality": "token accuracy", "agreement": None, "efficacy": None, "paraphrase_efficacy": None,
    }  # fmt: skip


# --- which locality ---------------------------------------------------------------------------------------------------
FLAT = {"prompt": "p", "target_new": "n", "rephrase_prompt": "r", "locality_prompt": "l", "locality_ground_truth": "o"}
REWRITE = {"prompt": "{} p", "subject": "s", "target_new": {"str": "n"}, "target_true": {"str": "o"}}


@pytest.mark.parametrize(
    ("row", "definition"),
    [
        ({"src": "p", "alt": "n", "loc": "l", "loc_ans": "o"}, "token accuracy"),
        (FLAT, "token accuracy"),  # WikiBigEdit
        (FLAT | {"case_id": 1, "ground_truth": "o"}, "likelihood"),
        ({"requested_rewrite": REWRITE, "neighborhood_prompts": ["l"]}, "likelihood"),
        ({"prompt": "p", "target": "n", "locality_prompt": "l", "locality_answer": "o"}, "token accuracy"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "n"}]}, "token accuracy"),
    ],
)
def test_the_schema_says_what_locality_is(row, definition):
    edits = edits_from_rows([row])
    assert locality_of(edits) == definition
    assert locality_of(edits.edits) == "token accuracy"  # a list says nothing
    assert locality_of(EditSet.of(edits, schema="counterfact")) == "likelihood"


def test_counterfact_sets_old_and_new_target_against_each_other():
    tokenizer = tiny_tokenizer()
    edit = Edit(
        prompt="P",
        target="new",
        rephrases=("R",),
        locality=(Locality(prompt="L", answer="old"), Locality(prompt="M", answer="old")),
    )
    asked = continuations(Prompter(tokenizer, eos=False), EditSet.of([edit], schema="counterfact"))
    assert [(words(tokenizer, one.expected), words(tokenizer, one.rival)) for one in asked] == [
        (("<s>P", "Ġnew"), ("<s>P", "Ġold")),
        (("<s>R", "Ġnew"), ("<s>R", "Ġold")),
        (("<s>L", "Ġold"), ("<s>L", "Ġnew")),
        (("<s>M", "Ġold"), ("<s>M", "Ġnew")),
    ]


def test_without_one_old_target_there_is_no_efficacy():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    near = (Locality(prompt="L", answer="old"), Locality(prompt="M", answer="older"))
    edits = EditSet.of(
        [Edit(prompt="P", target="new", locality=near), Edit(prompt="Q", target="new")], schema="counterfact"
    )
    found = teacher_force(model, tokenizer, edits)
    assert found.beside["efficacy"] == {}
    assert set(found.items["locality"]) == {0}
