"""Scores of answers: what is asked, in which context, and how it is counted."""

import pytest

from crispedit.edits import Edit, Locality
from crispedit.rows import Prompter
from crispedit.wild import QA_CONTEXT, Question, expected_drafts, in_context, questions, score, score_items
from families import CHATML, LLAMA_3, tiny_tokenizer

EDITS = [
    Edit(
        prompt="Who?",
        target="Ann",
        rephrases=("Which one?", "What person?"),
        locality=(Locality(prompt="Where?", answer="Here"), Locality(prompt="When?", answer=None)),
    ),
    Edit(prompt="Why?", target="So"),
]


def test_every_prompt_is_asked_once_with_what_would_be_right():
    asked = [(q.edit, q.kind, q.prompt, q.expected) for q in questions(EDITS)]
    assert asked == [
        (0, "reliability", "Who?", "Ann"),
        (0, "generalization", "Which one?", "Ann"),
        (0, "generalization", "What person?", "Ann"),
        (0, "locality", "Where?", "Here"),
        (0, "locality", "When?", None),
        (1, "reliability", "Why?", "So"),
    ]


def test_the_context_is_exactly_the_papers():
    assert QA_CONTEXT == "Please answer the question: \n\nQ: {q}\nA:"
    assert in_context("Who?", "no_context") == "Who?"
    assert in_context("Who?", "qa_context") == "Please answer the question: \n\nQ: Who?\nA:"
    turns = (("system", "Be brief."), ("user", "Who?"))
    assert in_context(turns, "qa_context") == (turns[0], ("user", "Please answer the question: \n\nQ: Who?\nA:"))


def test_an_expected_answer_is_a_draft_as_it_would_be_taught():
    """ "Who?" merges with the blank and the letter after it: that answer is no continuation of the prompt's tokens."""
    tokenizer = tiny_tokenizer(merges=(("Ġ", "H"), ("?", "Ġ"), ("?Ġ", "A")))
    asked = [q for q in questions(EDITS) if q.prompt in ("Who?", "Where?", "When?")]
    token = tokenizer.convert_tokens_to_ids
    here = [*map(token, ["ĠH", "e", "r", "e"]), tokenizer.eos_token_id]
    assert expected_drafts(Prompter(tokenizer), asked, "no_context") == [[], [tuple(here)], []]
    without = Prompter(tokenizer, eos=False)
    assert expected_drafts(without, asked, "qa_context")[1] == [tuple(map(token, ["ĠH", *"ere"]))]


@pytest.mark.parametrize("template", [CHATML, LLAMA_3])
def test_an_expected_answer_is_a_draft_in_a_chat(template):
    tokenizer = tiny_tokenizer(chat_template=template)
    prompter = Prompter(tokenizer)
    turns = (("system", "Be brief."), ("user", "Who?"))
    asked = [Question(0, "reliability", prompt, "Ann") for prompt in (turns, "Who?")]
    end = prompter.row(EDITS[0]).ids[-1]
    ann = (*tokenizer("Ann", add_special_tokens=False)["input_ids"], end)
    assert expected_drafts(prompter, asked, "qa_context") == [[ann], [ann]]


def test_scores_are_means_over_edits():
    given = ["ann", "Ann", "Bob", "here", "now", "no"]
    assert score(questions(EDITS), given) == {"reliability": 50.0, "generalization": 50.0, "locality": 100.0}
    base = ["", "", "", "", "then", ""]
    assert score(questions(EDITS), given, base=base)["locality"] == 50.0


def test_scores_are_kept_edit_by_edit():
    given = ["ann", "Ann", "Bob", "here", "now", "no"]
    assert score_items(questions(EDITS), given) == {
        "reliability": {0: 1.0, 1: 0.0},
        "generalization": {0: 0.5},
        "locality": {0: 1.0},
    }


def test_what_is_not_asked_has_no_score():
    assert score(questions(EDITS[1:]), ["So"]) == {"reliability": 100.0, "generalization": None, "locality": None}
