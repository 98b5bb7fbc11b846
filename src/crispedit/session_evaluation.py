"""What the rounds of a session come to: what is left of every one, drift, and the bundled world's abilities."""

from collections.abc import Mapping, Sequence
from typing import Any

from .editors import configured
from .edits import Edit, EditSet
from .evaluation import answers_of_base, measure, needs_base_answers
from .inputs import has_tasks
from .patch import StoredTensors, apply_to
from .progress import Progress, no_progress
from .session import Session
from .wild import CONTEXTS, mean_scores


def evaluate_session(
    session: Session,
    given: Sequence[EditSet] = (),
    number: int | None = None,
    *,
    judge: str = "exact",
    progress: Progress = no_progress,
    **options: Any,
) -> dict[str, Any]:
    """Asks the model after a round about the edits of all rounds up to it, where they are at hand.

    Args:
        session: Open for reading.
        given: Edits of rounds that the session has not kept, recognised by their hash.
        number: The round; the newest when omitted.
        judge: ``exact`` or ``contains``.
        progress: Called during every longer step.
        **options: For :func:`crispedit.models.load_model`.

    Returns:
        ``round``; ``rounds``, a list of ``number``, ``source``, ``count`` and, by context, reliability, generalization
        and locality in percent (``None`` where the edits are not at hand); ``capability`` as of ``evaluate``, with
        what the curvature ``predicted`` of the drift; ``judge``.

    Raises:
        ArtifactError: There is no such round, or a file is damaged.
        ConfigError: Edits were given that are of none of these rounds.
    """
    number = len(session.rounds) if number is None else number
    head = session.head_of(number)
    records = session.rounds[:number]
    session.check_given(given, number)
    sets = {record["number"]: session.edits_of(record, given) for record in records}
    every: list[Edit] = []
    spans: dict[int, range] = {}
    for of_round, found_edits in sets.items():
        if found_edits is not None:
            spans[of_round] = range(len(every), len(every) + len(found_edits))
            every += found_edits
    loaded, chat = session.load(0, **options), session.about["chat"]
    model, tokenizer = loaded.model, loaded.tokenizer
    base_answers = None
    if needs_base_answers(every):  # before it is edited: one model in memory, not two
        base_answers = answers_of_base(model, tokenizer, every, chat=chat, progress=progress)
    drift = None
    if head is not None:
        stored = StoredTensors(model, loaded.stored_dtype)
        base = {name: stored[name].clone() for name in head.changes}
        apply_to(model, head, loaded.stored_dtype)
        _, config = configured(session.about["editor"], session.about["settings"])
        matrices = config.matrices(model, session.about["layers"])
        drift = session.drift(loaded, matrices, base, session.curvature(0), progress)
    found = measure(
        model,
        tokenizer,
        every,
        base_answers=base_answers,
        tasks=has_tasks(model),
        judge=judge,
        chat=chat,
        progress=progress,
    )
    summary = found.summary()
    return {
        "round": number,
        "rounds": [
            {
                "number": record["number"],
                "source": record["edits"]["source"],
                "count": record["edits"]["count"],
                **{context: _of(found.edits[context], spans.get(record["number"])) for context in CONTEXTS},
            }
            for record in records
        ],
        "capability": {**summary["capability"], **(drift or {})},
        "judge": summary["judge"],
    }


def _of(items: Mapping[str, Mapping[int, float]], span: range | None) -> dict[str, float | None] | None:
    """The mean scores of some of the edits."""
    if span is None:
        return None
    return mean_scores(
        {kind: {edit: of_kind[edit] for edit in span if edit in of_kind} for kind, of_kind in items.items()}
    )
