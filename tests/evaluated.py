"""Evaluations made by hand, for what is computed from them."""

import torch

from crispedit.capability import TaskItems, TextSums
from crispedit.edits import Edit, EditSet, Locality
from crispedit.evaluate_job import Evaluated
from crispedit.evaluation import Evaluation
from crispedit.judge import Verdict
from crispedit.wild import CONTEXTS, items_of, questions

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> ![i](http://evil.example/a.png) a|b \u2028 `c`"

EDITS = EditSet.of(
    [
        Edit(
            prompt="Who?",
            target="Ann",
            rephrases=("Which one?", "What person?"),
            locality=(Locality(prompt="Where?", answer="Here"), Locality(prompt="When?", answer=None)),
            row=1,
        ),
        Edit(prompt="Why?", target="So", locality=(Locality(prompt="What for?", answer="Fun"),), row=2),
        Edit(prompt=NASTY, target="Bo", rephrases=("And?",), row=3),
    ],
    source="edits.json",
)
AFTER = ["Ann", "Ann", "Bob", "There", "then", "So", "Fun", NASTY, ""]
RIGHT: list[Verdict] = [True, True, False, False, True, True, True, False, False]
BEFORE = ["Al", "Al", "Al", "Here", "then", "Because", "Fun", "", "Bo"]
WAS_RIGHT: list[Verdict] = [False, False, False, True, True, False, True, False, True]


def evaluation(answers: list[str], verdicts: list[Verdict], *, hits: list[int], drift: list[float]) -> Evaluation:
    """The same answers in both contexts, a task and two texts."""
    asked = questions(EDITS)
    loss_base = torch.tensor([7.0, 9.0], dtype=torch.float64)
    moved = torch.tensor(drift, dtype=torch.float64)
    return Evaluation(
        edits={context: items_of(asked, verdicts) for context in CONTEXTS},
        texts=TextSums(drift=moved, loss_base=loss_base, loss=loss_base + moved, tokens=torch.tensor([10.0, 20.0])),
        has_base=True,
        tasks={"adding": TaskItems(hits=hits, counts=[1] * len(hits))},
        answers=dict.fromkeys(CONTEXTS, answers),
        verdicts=dict.fromkeys(CONTEXTS, verdicts),
        judged=None,
    )


def evaluated(**changes: object) -> Evaluated:
    """A model and its base on :data:`EDITS`."""
    fields = {
        "model": "edited",
        "base": "original",
        "edits": EDITS,
        "record": None,
        "judge": "exact",
        "chat": "auto",
        "stop_at_period": False,
        "after": evaluation(AFTER, RIGHT, hits=[1, 1, 0, 1], drift=[1.0, 2.0]),
        "before": evaluation(BEFORE, WAS_RIGHT, hits=[1, 1, 1, 1], drift=[0.0, 0.0]),
    }
    return Evaluated(**fields | changes)  # type: ignore[arg-type]
