"""Several questions to a server at once, in threads; answers as they come."""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from .endpoint import CallFailed
from .errors import ConfigError

CONCURRENCY = 8
"""Calls at once, by default."""

Question = TypeVar("Question")
Answer = TypeVar("Answer")
Sleep = Callable[[float], None]


class _Ended(Exception):
    """Nobody waits for this answer any more."""


def ask_all(
    ask: Callable[[Question, Sleep], Answer], questions: Sequence[Question], *, concurrency: int = CONCURRENCY
) -> Generator[tuple[int, Answer | CallFailed], None, None]:
    """Asks questions, so many at once, and gives answers as they come.

    Once the generator is closed, or a question has ended with an error other than ``CallFailed``, no further question
    is asked. The threads are daemons: neither Ctrl-C nor the end of the program waits for calls that are under way.

    Args:
        ask: Asks one question; it sleeps with the function that it is given.
        questions: In the order in which they are begun.
        concurrency: How many at once.

    Yields:
        The number of a question, and its answer, or why this call failed for good.

    Raises:
        Exception: Any other error that a question has ended with.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    answered: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()
    for number in range(len(questions)):
        waiting.put(number)
    ended = threading.Event()

    def sleep(seconds: float) -> None:
        if ended.wait(seconds):
            raise _Ended

    def work() -> None:
        while not ended.is_set():
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answered.put((number, ask(questions[number], sleep)))
            except _Ended:
                return
            except CallFailed as error:
                answered.put((number, error))
            except Exception as error:  # whoever waits for the answer must hear of it
                ended.set()
                answered.put((number, error))

    for _ in range(min(concurrency, len(questions))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in questions:
            number, answer = answered.get()
            if isinstance(answer, Exception) and not isinstance(answer, CallFailed):
                raise answer
            yield number, answer
    finally:
        ended.set()


def check_concurrency(option: str, value: int) -> None:
    """Refuses a number of calls at once that is none.

    Args:
        option: The option that gave it.
        value: Its value.

    Raises:
        ConfigError: It is below 1 or above 256.
    """
    if not 1 <= value <= 256:
        raise ConfigError(f"{option} is {value}; it must be from 1 to 256")
