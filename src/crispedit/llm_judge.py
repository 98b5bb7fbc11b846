"""A language model behind an OpenAI-compatible server as the judge; its replies are kept in the cache."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from .cache import replies_file
from .endpoint import CallFailed, Endpoint, Patience
from .errors import ConfigError, EndpointError, Interrupted
from .grading import PROMPT, REPLY_TOKENS, grading_prompt, read_verdict
from .judge import JUDGES, Case, Judge, Verdict, find_judge
from .progress import Progress, log, no_progress
from .replies import Replies, reply_key
from .workers import CONCURRENCY, Sleep, ask_all, check_concurrency

FAILURES = 5
"""So many calls in a row that failed for good, and no more are made: it is not the cases then."""
TOKEN_CHARACTERS = 4
"""Characters of English that a token stands for, roughly, in today's tokenizers; of the estimate only."""

PATIENCE = Patience()


def make_judge(
    name: str, *, model: str | None = None, key_variable: str | None = None, concurrency: int | None = None
) -> Judge:
    """The judge that the command line names.

    Args:
        name: A rule (``exact``, ``contains``), or the address of an OpenAI-compatible server.
        model: The judge's name at that server.
        key_variable: Environment variable with the server's key.
        concurrency: How many calls at once.

    Returns:
        The judge.

    Raises:
        ConfigError: There is no such judge, or its options do not fit it.
    """
    if "://" not in name:
        if name not in JUDGES and set(":/.") & set(name):
            raise ConfigError(
                f"judge is '{name}'; it must be {', '.join(JUDGES)}, or an address such as http://localhost:8000/v1"
            )
        judge = find_judge(name)
        given = {"--judge-model": model, "--judge-key-variable": key_variable, "--judge-concurrency": concurrency}
        for option, value in given.items():
            if value is not None:
                raise ConfigError(f"{option} is for a language model as the judge: give --judge URL")
        return judge
    if not (model or "").strip():
        raise ConfigError("--judge-model is missing: the judge's name at that server")
    concurrency = CONCURRENCY if concurrency is None else concurrency
    check_concurrency("--judge-concurrency", concurrency)
    endpoint = Endpoint(name, option="--judge", key_variable=key_variable, patience=PATIENCE)
    endpoint.check()
    return LlmJudge(endpoint, str(model), concurrency=concurrency)


class LlmJudge:
    """Asks a language model about every case that is not in the cache, several at once and the same one once.

    A case in which answer or target is blank is not asked about: it is right only if both are. A call that failed for
    good and a reply that cannot be read are no verdict; the reply is kept all the same, as the judge, at temperature 0,
    would give it again.

    Args:
        endpoint: The server.
        model: The judge's name there.
        concurrency: How many calls at once.
        path: The file of replies; that of the cache when omitted.
    """

    def __init__(
        self, endpoint: Endpoint, model: str, *, concurrency: int = CONCURRENCY, path: Path | None = None
    ) -> None:
        self.endpoint, self.model, self.concurrency = endpoint, model, concurrency
        self.path = path or replies_file()
        self._counts = dict.fromkeys(("distinct", "from_cache", "calls", "failed", "unreadable"), 0)
        self._tokens = {"input": 0, "output": 0}

    @property
    def name(self) -> str:
        """The model's."""
        return self.model

    def about(self) -> dict[str, Any]:
        """Address and model, and the counts of all calls so far.

        Returns:
            ``distinct`` cases that were not blank; how many of them came ``from_cache``; ``calls`` that were answered,
            or ``failed`` for good; ``unreadable`` replies; ``tokens`` that the server has counted (0: it does not).
        """
        return {
            "name": "llm",
            "model": self.model,
            "endpoint": self.endpoint.url,
            "prompt": reply_key(PROMPT)[:12],
            **self._counts,
            "tokens": dict(self._tokens),
        }

    def __call__(self, cases: Sequence[Case], *, progress: Progress = no_progress) -> list[Verdict]:
        """One verdict per case.

        Args:
            cases: What to judge.
            progress: Called after every reply.

        Returns:
            The verdicts.

        Raises:
            EndpointError: The server cannot be used; replies so far are kept.
            Interrupted: By Ctrl-C; replies so far are kept.
        """
        keys = {case: self._key(case) for case in cases if not _is_blank(case)}
        with Replies(self.path) as replies:
            found = replies.find(list(keys.values()))
            missing = [case for case, key in keys.items() if key not in found]
            self._counts["distinct"] += len(keys)
            self._counts["from_cache"] += len(keys) - len(missing)
            log.info("%s", self._estimate(len(cases), len(keys), missing))
            found |= self._ask([(keys[case], case) for case in missing], replies, progress)
        verdicts = {case: read_verdict(found[key]) for case, key in keys.items() if key in found}
        unreadable = [found[keys[case]] for case, verdict in verdicts.items() if verdict is None]
        self._counts["unreadable"] += len(unreadable)
        if unreadable:
            log.info("%d replies of the judge are no verdict, such as %r", len(unreadable), unreadable[0][:80])
        return [_of_blank(case) if case not in keys else verdicts.get(case) for case in cases]

    def _key(self, case: Case) -> str:
        return reply_key(self.endpoint.url, self._body(case))

    def _body(self, case: Case) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": grading_prompt(case)}],
            "temperature": 0,
            "max_tokens": REPLY_TOKENS,
        }

    def _estimate(self, cases: int, distinct: int, missing: Sequence[Case]) -> str:
        """What judging will take, in a line."""
        calls = len(missing)
        tokens = sum(len(grading_prompt(case)) for case in missing) // TOKEN_CHARACTERS
        known = f"{cases:,} answers, {distinct:,} different cases, {distinct - calls:,} of them in the cache"
        cost = (
            f"{calls:,} calls, about {tokens:,} tokens in ({TOKEN_CHARACTERS} characters each) and at most "
            f"{calls * REPLY_TOKENS:,} out"
        )
        return f"judge {self.model} at {self.endpoint.url}: {known}; {cost if calls else 'no calls'}"

    def _ask(self, missing: Sequence[tuple[str, Case]], replies: Replies, progress: Progress) -> dict[str, str]:
        """Replies to cases that are not in the cache, by key; what failed for good is not among them."""

        def ask(keyed: tuple[str, Case], sleep: Sleep) -> tuple[str, dict[str, int]]:
            key, case = keyed
            text, tokens = self.endpoint.post("/chat/completions", self._body(case), _read_reply, sleep=sleep)
            replies.keep(key, text)  # here: before this thread asks anything else
            return text, tokens

        found: dict[str, str] = {}
        failed: list[CallFailed] = []
        in_a_row = 0
        try:
            with closing(ask_all(ask, missing, concurrency=self.concurrency)) as answered:
                for done, (number, reply) in enumerate(answered, 1):
                    if isinstance(reply, CallFailed):
                        failed.append(reply)
                        in_a_row += 1
                        if in_a_row == FAILURES or done == len(missing) == len(failed):
                            raise EndpointError(f"{in_a_row} calls in a row failed, the last: {reply}")
                    else:
                        in_a_row = 0
                        found[missing[number][0]] = reply[0]
                        self._count(reply[1])
                    progress("judging", done, len(missing))
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted{_kept(missing, replies)}") from None
        except EndpointError as error:
            raise EndpointError(f"{error}{_kept(missing, replies)}") from None
        self._counts["failed"] += len(failed)
        if failed:
            log.info("%d calls of the judge failed for good, the last: %s", len(failed), failed[-1])
        return found

    def _count(self, tokens: dict[str, int]) -> None:
        self._counts["calls"] += 1
        for name, count in tokens.items():
            self._tokens[name] += count


def _kept(missing: Sequence[tuple[str, Case]], replies: Replies) -> str:
    """What is left of a run that ended early, for its message."""
    kept = len(replies.find([key for key, _ in missing]))
    said = f"{kept} of {len(missing)} replies are kept in {replies.path}; the same command goes on from there"
    return f"; {said}" if kept else ""


def _read_reply(found: Any) -> tuple[str, dict[str, int]]:
    """Text and tokens of a chat completion; text that is ``null``, as of a model that only thought, is empty."""
    text = found["choices"][0]["message"]["content"]
    if text is not None and not isinstance(text, str):
        raise TypeError("content is no text")
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counted = {"input": usage.get("prompt_tokens"), "output": usage.get("completion_tokens")}
    text = (text or "").encode(errors="replace").decode()  # half a character is no text to SQLite
    return text, {name: count for name, count in counted.items() if isinstance(count, int)}


def _is_blank(case: Case) -> bool:
    return not (case.answer.strip() and case.target.strip())


def _of_blank(case: Case) -> bool:
    return not (case.answer.strip() or case.target.strip())
