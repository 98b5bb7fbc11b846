"""Everything that ``evaluate`` measures, once more, from its definitions and at any price.

One row at a time, one token at a time: no batches, no padding, no cache, and no code of crispedit. Rows are the files'
JSON objects; a model is called with token ids and gives logits; the tokenizer turns one text into ids and back.
"""

import math
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

KINDS = ("reliability", "generalization", "locality")
QUESTION = "Please answer the question: \n\nQ: {}\nA:"
CONTEXTS = {"no_context": "{}", "qa_context": QUESTION}
LIMIT = 40


@dataclass(frozen=True)
class Fact:
    """A row: ``near`` are locality prompts with their answers, ``old`` the old target of CounterFact."""

    prompt: str
    target: str
    rephrases: list[str]
    near: list[tuple[str, str | None]]
    old: str | None = None


# ---------------------------------------------------------------- the schemas
def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def read_zsre(row: dict[str, Any]) -> Fact:
    near = [
        (text[len("nq question: ") :] + "?", answer)
        for text, answer in zip(*map(listed, (row["loc"], row["loc_ans"])), strict=True)
    ]
    return Fact(row["src"], row["alt"].strip(), listed(row["rephrase"]), near)


def read_flat(row: dict[str, Any]) -> Fact:
    near = zip(listed(row["locality_prompt"]), listed(row["locality_ground_truth"]), strict=True)
    return Fact(row["prompt"], row["target_new"], listed(row["rephrase_prompt"]), list(near), row.get("ground_truth"))


def read_rome(row: dict[str, Any]) -> Fact:
    rewrite = row["requested_rewrite"]
    old = rewrite["target_true"]["str"]
    near = [(text, old) for text in row["neighborhood_prompts"]]
    prompt = rewrite["prompt"].format(rewrite["subject"])
    return Fact(prompt, rewrite["target_new"]["str"], row["paraphrase_prompts"], near, old)


def read_plain(row: dict[str, Any]) -> Fact:
    near = zip(listed(row["locality_prompt"]), listed(row["locality_answer"]), strict=True)
    return Fact(row["prompt"], row["target"], listed(row["rephrase"]), list(near))


READ: dict[str, Callable[[dict[str, Any]], Fact]] = {
    "zsre": read_zsre,
    "counterfact": read_flat,
    "counterfact-rome": read_rome,
    "wikibigedit": read_flat,
    "plain": read_plain,
}


def prompts_of(fact: Fact) -> list[tuple[str, str, str | None]]:
    """(kind, prompt, right answer) of every question."""
    return [
        ("reliability", fact.prompt, fact.target),
        *(("generalization", text, fact.target) for text in fact.rephrases),
        *(("locality", text, answer) for text, answer in fact.near),
    ]


# ---------------------------------------------------------------- free answers
@torch.no_grad()
def next_logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def answer(model: Any, tokenizer: Any, prompt: str) -> tuple[str, str]:
    """The greedy answer by our stop rule, and by the published one, without the blanks around them."""
    ids, new, text, published = encode(tokenizer, prompt), [], "", None
    while len(new) < LIMIT and "\n" not in text.lstrip():
        new.append(int(next_logits(model, ids + new).argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
        text = tokenizer.decode(new, skip_special_tokens=True)
        if published is None and ("." in text or "\n" in text):
            published = text
    published = text if published is None else published
    for suffix in (".", "\n"):
        published = published[: -len(suffix)] if published.endswith(suffix) else published
    return text.lstrip().split("\n")[0].strip(), published.strip()


# ---------------------------------------------------------------- judges
def words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def exact(given: str, right: str) -> bool:
    return words(given) == words(right)


def contains(given: str, right: str) -> bool:
    said, wanted = words(given), words(right)
    return any(said[start : start + len(wanted)] == wanted for start in range(len(said) - len(wanted) + 1))


# ---------------------------------------------------------------- teacher forcing
def split(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """The tokens of prompt and answer, and how many of them are the prompt's."""
    whole, alone = encode(tokenizer, f"{prompt} {answer}"), encode(tokenizer, prompt)
    length = 0
    while length < len(alone) and alone[length] == whole[length]:
        length += 1
    return whole, max(length, 1)


def forced(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int], float]:
    """First choices at the tokens of an answer, the tokens, and their mean negative log-likelihood."""
    ids, length = split(tokenizer, prompt, answer)
    choices, nll = [], 0.0
    for place in range(length, len(ids)):
        logits = next_logits(model, ids[:place])
        choices.append(int(logits.argmax()))
        nll -= float(logits.log_softmax(-1)[ids[place]])
    return choices, ids[length:], nll / len(choices)


def share(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


# ---------------------------------------------------------------- everything of an edit set
@dataclass(frozen=True)
class Second:
    """Scores by edit, 0 to 1: ``wild[judge][context][kind][edit]``, ``forced[kind][edit]``, ``beside[name][edit]``."""

    wild: dict[str, Any]
    forced: dict[str, Any]
    beside: dict[str, Any]


JUDGES = {"exact": (exact, 0), "contains": (contains, 0), "exact, published stop": (exact, 1)}


def evaluate(model: Any, base: Any, tokenizer: Any, rows: list[dict[str, Any]], schema: str) -> Second:
    facts = [READ[schema](row) for row in rows]
    wild: dict[str, Any] = {judge: {context: {kind: {} for kind in KINDS} for context in CONTEXTS} for judge in JUDGES}
    for context, form in CONTEXTS.items():
        for number, fact in enumerate(facts):
            for kind, prompt, right in prompts_of(fact):
                given = answer(model, tokenizer, form.format(prompt))
                before = answer(base, tokenizer, form.format(prompt)) if right is None else (right, right)
                for judge, (decide, rule) in JUDGES.items():
                    of_kind = wild[judge][context][kind]
                    of_kind.setdefault(number, []).append(decide(given[rule], before[rule]))
    accuracy: dict[str, Any] = {kind: {} for kind in KINDS}
    likelier: dict[str, Any] = {kind: {} for kind in KINDS}
    agreement: dict[int, list[float]] = {}
    for number, fact in enumerate(facts):
        for kind, prompt, right in prompts_of(fact):
            if right is None:
                continue
            choices, labels, nll = forced(model, tokenizer, prompt, right)
            accuracy[kind].setdefault(number, []).append(share(choices, labels))
            if kind == "locality":
                agreement.setdefault(number, []).append(share(choices, forced(base, tokenizer, prompt, right)[0]))
            if schema.startswith("counterfact"):
                other = fact.target if kind == "locality" else fact.old
                likelier[kind].setdefault(number, []).append(nll < forced(model, tokenizer, prompt, other)[2])
    locality = likelier if schema.startswith("counterfact") else accuracy
    return Second(
        wild={
            judge: {context: {kind: means(wild[judge][context][kind]) for kind in KINDS} for context in CONTEXTS}
            for judge in JUDGES
        },
        forced={
            "reliability": means(accuracy["reliability"]),
            "generalization": means(accuracy["generalization"]),
            "locality": means(locality["locality"]),
        },
        beside={
            "agreement": means(agreement),
            "efficacy": means(likelier["reliability"]),
            "paraphrase_efficacy": means(likelier["generalization"]),
        },
    )


def means(scores: dict[int, list[float]]) -> dict[int, float]:
    return {number: sum(some) / len(some) for number, some in scores.items()}


def percent(scores: dict[int, float]) -> float | None:
    return 100 * math.fsum(scores.values()) / len(scores) if scores else None


# ---------------------------------------------------------------- texts
def drift(base: Any, model: Any, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """KL(base ‖ model) and both losses, means over all tokens that have one before them, in nats."""
    sums, count = [0.0, 0.0, 0.0], 0
    for text in texts:
        ids = encode(tokenizer, text)[:512]
        for place in range(1, len(ids)):
            log_p, log_q = (next_logits(one, ids[:place]).log_softmax(-1) for one in (base, model))
            sums[0] += float((log_p.exp() * (log_p - log_q)).sum())
            sums[1] -= float(log_p[ids[place]])
            sums[2] -= float(log_q[ids[place]])
            count += 1
    return dict(zip(("drift", "loss_base", "loss"), (value / count for value in sums), strict=True))
