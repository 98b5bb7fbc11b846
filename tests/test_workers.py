"""Questions in threads: every answer once, and an end that ends everything."""

import threading
import time

import pytest

from crispedit.endpoint import CallFailed
from crispedit.errors import ConfigError
from crispedit.workers import ask_all, check_concurrency


def test_every_question_is_answered_once():
    def ask(question, sleep):
        sleep(0.001 * (question % 7))
        if question % 5 == 0:
            raise CallFailed(f"no {question}")
        return question**2

    found = dict(ask_all(ask, range(50), concurrency=8))
    assert sorted(found) == list(range(50))
    for question, answer in found.items():
        assert str(answer) == (f"no {question}" if question % 5 == 0 else str(question**2))
    assert list(ask_all(ask, [])) == []


def test_another_error_ends_everything_and_is_the_one_that_is_raised():
    begun = []

    def ask(question, sleep):
        begun.append(question)
        if question == 3:
            raise ValueError("the reason")
        sleep(60)

    with pytest.raises(ValueError, match="the reason"):
        list(ask_all(ask, range(100), concurrency=4))
    assert sorted(begun) == [0, 1, 2, 3]


def test_closing_wakes_those_that_sleep_and_begins_no_more():
    begun, woken = [], threading.Event()

    def ask(question, sleep):
        begun.append(question)
        if question:
            try:
                sleep(60)
            finally:
                woken.set()
        return question

    answers = ask_all(ask, range(100), concurrency=2)
    assert next(answers) == (0, 0)
    answers.close()
    assert woken.wait(10)
    time.sleep(0.05)
    assert set(begun) <= {0, 1, 2}


@pytest.mark.parametrize("value", [0, -1, 257])
def test_a_number_of_calls_that_is_none(value):
    with pytest.raises(ConfigError, match=f"--x is {value}; it must be from 1 to 256"):
        check_concurrency("--x", value)
