"""What the words of a report mean: the protocol by which its numbers were measured, in plain sentences."""

from collections.abc import Collection

from .bundled.abilities import PROBE_ITEMS
from .bundled.world import QA_CONTEXT
from .generation import MAX_NEW_TOKENS
from .statistics import LEVEL, POWER, RESAMPLES
from .teacher_forced import Definition

JUDGES = {
    "exact": "An answer is right if it equals the target once both are in lower case and without ASCII punctuation, "
    "the articles a, an and the, and repeated blanks. A whole sentence around the target is wrong.",
    "contains": "An answer is right if the target stands in it as whole words, once both are in lower case and "
    "without ASCII punctuation, the articles a, an and the, and repeated blanks.",
}


def definitions(
    measured: Collection[str],
    *,
    judge: str,
    stop_at_period: bool,
    has_base: bool,
    forced: Definition | None = None,
) -> list[dict[str, str]]:
    """The definitions that a report needs.

    Args:
        measured: Names of the measures in it (:func:`crispedit.tradeoff.measures`).
        judge: Who decided what is right.
        stop_at_period: Whether answers were cut at the first period too.
        has_base: Whether there is a base to compare with.
        forced: What teacher-forced locality is, where there are teacher-forced scores.

    Returns:
        ``term`` and ``text`` of each, in the order in which they are read; of the context, also its ``exact`` wording.
    """
    cut = "line break or period" if stop_at_period else "line break"
    found = [
        ("Answer", f"Greedy decoding of at most {MAX_NEW_TOKENS} new tokens, from the prompt alone. It ends at the "
         f"end-of-sequence token and is cut at its first {cut}. Nothing of the target is shown to the model: this is "
         "the WILD protocol, not teacher forcing."),
        ("No context", "The prompt exactly as the edit set has it."),
        ("QA context", "The prompt inside the wording below, with {q} replaced by it. In a conversation, that is the "
         "last message."),
        ("Right", JUDGES.get(judge, f"Decided by the judge {judge}. An answer without a verdict counts neither as "
                             "right nor as wrong.")),
        ("Holds", "An edit holds if its own prompt, without context, is answered with the target."),
        ("Reliability", "The share of edits whose prompt is answered with the target."),
        ("Generalization", "The same for other wordings of the prompt. Wordings of one edit count together as one."),
        ("Locality", "The share of unrelated prompts that are answered as the edit set says; where it says nothing, "
         "as the base model answers. Prompts of one edit count together as one."),
        ("Edit success", "The mean of reliability and generalization, without context."),
    ]  # fmt: skip
    if forced is not None:
        found += _teacher_forced(measured, forced)
    if "abilities" in measured:
        bundled = f" Of the bundled world's, {PROBE_ITEMS} items each, four are answered freely and must be exactly "
        bundled += "right; prose is the share of next tokens that are the model's first choice."
        found.append(("Abilities", "The mean over the tasks." + (bundled if "task.prose" in measured else "")))
    if "drift" in measured:
        found.append(
            ("Drift", "How far the model's predictions have moved on texts that no edit is about: the mean over their "
             "tokens of KL(base ‖ model), in nats. 0 is a model that predicts exactly what its base does.")
        )  # fmt: skip
    if "loss" in measured:
        found.append(("Loss", "The mean negative log-likelihood of the same texts, in nats per token."))
    found.append(
        ("Interval", f"Of {100 * LEVEL:g} %, by a percentile bootstrap with {RESAMPLES:,} resamples of the items"
         + ("; differences are paired, resampled with the same items of both models" if has_base else "")
         + ". Where all items agree, the exact binomial bound is added.")
    )  # fmt: skip
    if has_base:
        found.append(
            ("Could have shown", f"The smallest true difference that such a sample would have told from 0 with "
             f"{100 * POWER:g} % power. Where no difference is found, a smaller one may still be there.")
        )  # fmt: skip
    return [
        {"term": term, "text": text, **({"exact": QA_CONTEXT} if term == "QA context" else {})} for term, text in found
    ]


def _teacher_forced(measured: Collection[str], locality: Definition) -> list[tuple[str, str]]:
    """What the scores with everything before a token given are: not those of answers."""
    of_locality = {
        "token accuracy": "Locality is the same of the edit set's own answer after unrelated prompts.",
        "likelihood": "Locality is the share of unrelated prompts whose answer the model finds likelier than the "
        "new target.",
    }[locality]
    found = [
        ("Teacher-forced", "At every token of the right answer, what the model would say next if all tokens before had "
         "been said right. The model need not arrive at the answer by itself, nor stop after it, so these scores are "
         "as a rule higher than those of answers, and say nothing of those. Reliability and generalization "
         f"are the share of the target's tokens that are the model's first choice. {of_locality}"),
    ]  # fmt: skip
    if "teacher_forced.agreement" in measured:
        found.append(
            ("Agreement", "The share of the tokens of those answers at which the first choices of model and base are "
             "the same, right or wrong.")
        )  # fmt: skip
    if "teacher_forced.efficacy" in measured:
        found.append(
            ("Efficacy", "The share of edit prompts after which the new target is likelier, per token, than the old "
             "one; paraphrase efficacy is the same of rephrased prompts.")
        )  # fmt: skip
    return found
