"""What the numbers of a report say, in one sentence and some caveats: by rules, from the numbers and their intervals.

A change is claimed only where the interval of the paired difference leaves 0 out; where it does not, the sentence says
what difference the sample could have shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .statistics import Difference
from .tradeoff import change

WIDE = 20.0
"""Points: where the interval of the edits that hold is wider, there are too few of them for the share to mean much."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """How many edits hold: whose own prompt is answered with the target.

    Args:
        after: Of the model.
        before: Of the base, if there is one.
        judged: How many edits have a verdict.
        count: How many there are.
    """

    after: int
    before: int | None
    judged: int
    count: int


def sentence(held: Held, measures: Mapping[str, Mapping[str, Any]], *, has_base: bool) -> str:
    """The verdict.

    Args:
        held: How many edits hold.
        measures: Rows of the report's ``measures``, by name.
        has_base: Whether the model was compared with a base.

    Returns:
        A sentence: whether the edits hold and carry over; what happened to unrelated answers and to abilities.
    """
    gained = [_hold(held, measures), _follow(measures)]
    cost = [_stay(measures), _kept(measures, has_base)]
    parts = [" and ".join(filter(None, gained)), ", and ".join(filter(None, cost))]
    return "; ".join(filter(None, parts)) + "."


def _hold(held: Held, measures: Mapping[str, Mapping[str, Any]]) -> str:
    if not held.judged:
        return "No answer was judged" if held.count else "There are no edits"
    said = _count(held.after, held.judged) + (" that were judged" if held.judged < held.count else "")
    said = f"{said} {'holds' if held.after == 0 or held.judged == 1 else 'hold'}"
    if held.judged == 1 and not held.after:
        said = "The one edit" + (" that was judged" if held.count > 1 else "") + " does not hold"
    remarks = [f"{held.before} did before"] if held.before else []
    low, high = measures["reliability"]["interval"]
    if high - low > WIDE:
        remarks.append(f"too few to say more than {low:.0f} to {high:.0f} %")
    return f"{said} ({'; '.join(remarks)})" if remarks else said


def _count(some: int, of: int) -> str:
    if of == 1:
        return "The one edit"
    if some == of:
        return f"All {of:,} edits"
    return f"{some:,} of {of:,} edits" if some else f"None of the {of:,} edits"


def _follow(measures: Mapping[str, Mapping[str, Any]]) -> str:
    found = measures.get("generalization")
    return "" if found is None else f"{found['after']:.1f} % of rephrased prompts get the new answer"


def _stay(measures: Mapping[str, Mapping[str, Any]]) -> str:
    found = measures.get("locality")
    if found is None:
        return ""
    if found["difference"] is None:
        return f"{found['after']:.1f} % of unrelated prompts are answered as they should be"
    difference = Difference(**found["difference"])
    verb = {"loss": "lose", "gain": "gain"}.get(change("locality", difference))
    if verb is None:
        return f"no loss of unrelated answers is found ({_could(difference, 1, 'points')})"
    return f"unrelated answers {verb} {abs(difference.value):.1f} points ({_between(difference, 1)})"


def _kept(measures: Mapping[str, Mapping[str, Any]], has_base: bool) -> str:
    if not has_base:
        return "what the edit cost cannot be said without the base model"
    if "abilities" in measures:
        difference = Difference(**measures["abilities"]["difference"])
        verb = {"loss": "lose", "gain": "gain"}.get(change("abilities", difference))
        if verb is None:
            return f"no loss of abilities is found ({_could(difference, 2, 'points')})"
        return f"abilities {verb} {abs(difference.value):.2f} points ({_between(difference, 2)})"
    if "loss" in measures:
        difference = Difference(**measures["loss"]["difference"])
        verb = {"loss": "rises", "gain": "falls"}.get(change("loss", difference))
        if verb is None:
            return f"no rise of the loss on other texts is found ({_could(difference, 4, 'nats per token')})"
        amount = f"{abs(difference.value):.4f} nats per token ({_between(difference, 4)})"
        return f"the loss on other texts {verb} by {amount}"
    return "what the edit did to other texts was not measured"


def _could(difference: Difference, digits: int, unit: str) -> str:
    """What could have been shown; rounded up, so that no more is claimed than there is."""
    if unit == "points" and difference.detectable > 100:
        return "too few to show any"
    step = 10.0**-digits
    shown = round(difference.detectable, digits)
    return f"could have shown ≥ {shown if shown >= difference.detectable - 1e-12 else shown + step:.{digits}f} {unit}"


def _between(difference: Difference, digits: int) -> str:
    """The interval of the size of a change."""
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return f"{low:.{digits}f} to {high:.{digits}f}"


def certificate(budget: Mapping[str, Any]) -> str:
    """What is left of a damage budget, as it is measured now.

    Args:
        budget: What :meth:`crispedit.evaluate_job.Evaluated.budget` says.

    Returns:
        A sentence or two.
    """
    texts = f"{budget['texts']} {'held-out' if budget['same_texts'] else 'other'} texts"
    interval = f"{budget['low']:.4f} to {budget['high']:.4f}"
    said = (
        f"{'Met' if budget['met'] else 'Not met'}: drift of {budget['drift']:.4f} nats per token ({interval}) on "
        f"{texts}, of {budget['budget']:.4f} that were allowed; when it was edited, {budget['recorded']['drift']:.4f}."
    )
    if budget["same_base"] is False:
        said += " The base is not what was edited: its weights are others, and this drift is not that of the edit."
    return said


def caveats(
    held: Held,
    measures: Mapping[str, Mapping[str, Any]],
    *,
    base: str | None,
    unjudged: int,
    run: Mapping[str, Any] | None,
) -> list[str]:
    """What a reader must know before trusting the sentence.

    Args:
        held: How many edits hold.
        measures: Rows of the report's ``measures``, by name.
        base: The name of the base, if there is one.
        unjudged: How many answers have no verdict though there is something that would be right.
        run: The report's ``run``.

    Returns:
        A sentence or two each.
    """
    found: list[str] = []
    if held.judged:
        low, high = measures["reliability"]["interval"]
        if high - low > WIDE:
            found.append(
                f"{held.judged} edits are few: of more like these, between {low:.0f} and {high:.0f} % would hold."
                if held.judged > 1
                else "One edit says nothing about others like it."
            )
    missing = [name for name in ("generalization", "locality") if name not in measures]
    what = {"generalization": "rephrased", "locality": "unrelated"}
    if missing:
        said = " and ".join(what[name] for name in missing)
        found.append(f"The edit set has no {said} prompts: {' and '.join(missing)} {_are(missing)} not known.")
    if unjudged:
        found.append(f"{unjudged:,} answers were not judged; they count neither as right nor as wrong.")
    if base is None:
        found.append("No base model was given (--base): answers before the edit, differences and drift are missing.")
    elif "drift" not in measures:
        found.append("No texts were given or found (--texts): drift and loss are missing.")
    if base is not None and "abilities" not in measures:
        found.append("No tasks were run: what the model can still do is judged by texts alone, or not at all.")
    if run is not None and not run["same_edits"]:
        of = f" ({run['edits']['count']} edits)" if run["edits"].get("count") else ""
        found.append(f"crispedit.json records another edit set{of}: the model may have been edited with other edits.")
    if run is not None and base is not None and run["model"] != base:
        found.append(f"crispedit.json names '{run['model']}' as the base; here the model is compared with '{base}'.")
    return found


def _are(items: Sequence[str]) -> str:
    return "are" if len(items) > 1 else "is"
