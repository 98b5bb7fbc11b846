"""What a judging model is asked, and what its replies are taken for."""

import pytest

from crispedit.grading import PROMPT, grading_prompt, read_verdict
from crispedit.judge import Case

RIGHT = [
    "A", "a", " A ", "A.", " a.", "(A)", "[A]", "**A**", "`A`", '"A"', "A:", "A)", "A: CORRECT", "A - Correct",
    "A (CORRECT)", "**A: CORRECT**", "A\nCORRECT", "CORRECT", "Correct.", "correct", "Answer: A", "The answer is A.",
    "Final answer: **A**", "My verdict is A", "Grade: CORRECT", "CORRECT (A)", "\n\nA\n", "A\n\nThe answer names both.",
    "$\\boxed{A}$", "<think>B? No, it has all of it.</think>\n\nA", "The answer is correct", "A\nA",
]  # fmt: skip
WRONG = [
    "B", "b", "B.", "**B**", "B: INCORRECT", "INCORRECT", "incorrect.", "Answer: B", "The correct answer is B.",
    "B\n(not A)", "INCORRECT (B)", "The answer is incorrect.",
]  # fmt: skip
UNREADABLE = [
    "", " ", "...", "C", "AB", "A or B", "A, B", "A/B", "A: INCORRECT", "B: CORRECT", "A: CORRECT\nB: INCORRECT",
    "A\nB", "Not A", "A correct answer would name both rivers", "The answer is a river", "As a judge I say", "null",
    "not correct", "Both", "<think>I lean to A", "1", "yes", "Because it is correct: A, I think", "А",
    "correct and incorrect",
]  # fmt: skip


@pytest.mark.parametrize("reply", RIGHT)
def test_right(reply):
    assert read_verdict(reply) is True


@pytest.mark.parametrize("reply", WRONG)
def test_wrong(reply):
    assert read_verdict(reply) is False


@pytest.mark.parametrize("reply", UNREADABLE)
def test_neither(reply):
    assert read_verdict(reply) is None


def test_the_prompt_has_the_case_in_it_once_and_as_it_is():
    case = Case("Who wrote {this}?", "Ann {0}", "It was\tAnn % \\n")
    prompt = grading_prompt(case)
    assert prompt == PROMPT.replace("{question}", case.question).replace("{target}", case.target).replace(
        "{answer}", case.answer
    )
    end = prompt[prompt.index("Now grade this one.") :].splitlines()
    assert end[1:4] == ["Question: Who wrote {this}?", "Target: Ann {0}", "Answer: It was\tAnn % \\n"]
    assert end[-1] == "Reply with the letter alone, A or B."
