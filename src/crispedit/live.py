"""A model behind an OpenAI-compatible server, asked as the wild protocol asks a model in memory."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from .endpoint import CallFailed, Endpoint, Patience
from .errors import ConfigError, EditsError, check_choice
from .generation import MAX_NEW_TOKENS, cut
from .progress import Progress, no_progress
from .wild import CONTEXTS, Question, in_context
from .workers import CONCURRENCY, Sleep, ask_all, check_concurrency

APIS = ("completions", "chat")
PATIENCE = Patience(timeout=300.0)
"""A server may load the model at the first call, and have other calls wait."""

Prompt = str | tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """A model that a server has.

    Args:
        endpoint: The server.
        name: The model's name there.
        api: ``completions``: the prompt as it is; ``chat``: as the user's turn, through the server's chat template.
        concurrency: How many calls at once.
    """

    endpoint: Endpoint
    name: str
    api: str = "completions"
    concurrency: int = CONCURRENCY

    @classmethod
    def at(
        cls, url: str, name: str, *, api: str | None, key_variable: str | None, concurrency: int | None
    ) -> "LiveModel":
        """The model that the command line names.

        Args:
            url: The server's address.
            name: The model's name there.
            api: ``completions`` when omitted.
            key_variable: Environment variable with the server's key.
            concurrency: How many calls at once.

        Returns:
            The model; the server is there, but has not been asked anything.

        Raises:
            ConfigError: An option has a value that it cannot have.
        """
        if not name.strip():
            raise ConfigError("MODEL is empty; with --endpoint it is the model's name at that server")
        api = APIS[0] if api is None else api
        concurrency = CONCURRENCY if concurrency is None else concurrency
        check_choice("endpoint-api", api, APIS)
        check_concurrency("--endpoint-concurrency", concurrency)
        endpoint = Endpoint(url, option="--endpoint", key_variable=key_variable, patience=PATIENCE)
        endpoint.check()
        return cls(endpoint=endpoint, name=name, api=api, concurrency=concurrency)

    def answer_questions(
        self, asked: Sequence[Question], *, stop_at_period: bool = False, progress: Progress = no_progress
    ) -> dict[str, list[str]]:
        """The model's answers to questions, in both contexts.

        Args:
            asked: The questions.
            stop_at_period: Also cut answers at the first period.
            progress: Called after every answer.

        Returns:
            The answers by context.
        """
        for question in asked:  # what cannot be asked is said before anything is
            self._body(question.prompt)
        return {
            context: self.answers(
                [in_context(question.prompt, context) for question in asked],
                stop_at_period=stop_at_period,
                what=f"asking, {context}",
                progress=progress,
            )
            for context in CONTEXTS
        }

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        stop_at_period: bool = False,
        what: str = "asking",
        progress: Progress = no_progress,
    ) -> list[str]:
        """Answers at temperature 0, of at most as many tokens as a model in memory gives, cut as its are.

        Args:
            prompts: Texts, or conversations as (role, content) turns; the same one is asked once.
            stop_at_period: Also cut at the first period.
            what: Named in the progress.
            progress: Called after every answer.

        Returns:
            One answer per prompt.

        Raises:
            EndpointError: A call failed for good: scores are of all prompts or of none.
        """
        distinct = list(dict.fromkeys(prompts))
        found: dict[Prompt, str] = {}
        with closing(ask_all(self._answer, distinct, concurrency=self.concurrency)) as answered:
            for number, answer in answered:
                if isinstance(answer, CallFailed):
                    raise answer
                found[distinct[number]] = cut(answer, stop_at_period)
                progress(what, len(found), len(distinct))
        return [found[prompt] for prompt in prompts]

    def _answer(self, prompt: Prompt, sleep: Sleep) -> str:
        route = "/completions" if self.api == "completions" else "/chat/completions"
        return self.endpoint.post(route, self._body(prompt), self._read, sleep=sleep)

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        settings = {"model": self.name, "max_tokens": MAX_NEW_TOKENS, "temperature": 0}
        turns = (("user", prompt),) if isinstance(prompt, str) else prompt
        if self.api == "chat":
            return {**settings, "messages": [{"role": role, "content": content} for role, content in turns]}
        if len(turns) > 1:
            raise EditsError("a conversation of several turns needs a chat template: give --endpoint-api chat")
        return {**settings, "prompt": turns[0][1]}

    def _read(self, found: Any) -> str:
        choice = found["choices"][0]
        text = choice["text"] if self.api == "completions" else choice["message"]["content"]
        if text is None and self.api == "chat":  # it said nothing, or only thought
            return ""
        if not isinstance(text, str):
            raise TypeError("the text is no text")
        return text

    def about(self) -> dict[str, str]:
        """Where it is and how it is asked; JSON-ready."""
        return {"url": self.endpoint.url, "model": self.name, "api": self.api}
