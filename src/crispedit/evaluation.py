"""``evaluate``: everything that is measured of a model, in the one JSON shape that all commands use."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .capability import Logits, TaskItems, TextSums, bundled_items, drift_of_texts, logits_of
from .edits import Edit
from .errors import ModelError
from .judge import find_judge
from .models import frozen
from .progress import Progress, no_progress
from .rows import Chat, Prompter
from .texts import text_batches
from .wild import Items, Question, Verdict, answer_edits, mean_scores, questions, verdict_items


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of a model, item by item: what intervals are computed from.

    Args:
        edits: By context, the scores of every edit (:func:`crispedit.wild.score_items`).
        texts: Drift and losses by text, where there were texts.
        has_base: Whether they were compared with a base model.
        tasks: By task, where there were tasks.
        answers: By context, the answers to all questions about the edits.
        verdicts: By context, whether these are right.
    """

    edits: dict[str, Items]
    texts: TextSums | None
    has_base: bool
    tasks: dict[str, TaskItems] = field(default_factory=dict)
    answers: dict[str, list[str]]
    verdicts: dict[str, list[Verdict]]

    def items(self, count: int) -> dict[str, Any]:
        """What was measured item by item, JSON-ready.

        Args:
            count: How many edits there are.

        Returns:
            ``edits``: by context and kind, a list over all edits (``None`` where there is no score); ``tasks``, by
            name; ``texts``, the sums of each, or ``None``.
        """
        return {
            "edits": {
                context: {kind: [of_kind.get(edit) for edit in range(count)] for kind, of_kind in items.items()}
                for context, items in self.edits.items()
            },
            "tasks": {name: asdict(items) for name, items in self.tasks.items()},
            "texts": {name: values.tolist() for name, values in vars(self.texts).items()} if self.texts else None,
        }

    def summary(self) -> dict[str, Any]:
        """The means, as ``crispedit evaluate`` writes them."""
        capability: dict[str, Any] = {"drift": None, "loss_base": None, "loss": None}
        if self.texts is not None:
            means = asdict(self.texts.means())
            capability = means if self.has_base else {**capability, "loss": means["loss"]}
        capability["tasks"] = {name: items.score for name, items in self.tasks.items()}
        scores = {context: mean_scores(items) for context, items in self.edits.items()}
        return {**scores, "teacher_forced": None, "capability": capability}


def measure(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    base: Logits | None = None,
    base_answers: dict[str, list[str]] | None = None,
    texts: Sequence[str] | None = None,
    tasks: bool = False,
    judge: str = "exact",
    chat: Chat = "auto",
    stop_at_period: bool = False,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluates a model on edits, freely answering with and without context, and on its capabilities.

    Args:
        model: The model, edited or not.
        tokenizer: Its tokenizer.
        edits: What to ask about.
        base: Logits of the model before editing, for drift.
        base_answers: Its answers, for locality prompts without an answer.
        texts: Texts for drift and capability loss; all of them are used.
        tasks: Whether to run the bundled world's five tasks.
        judge: ``exact`` or ``contains``.
        chat: Whether prompts go through the chat template.
        stop_at_period: Also cut answers at the first period, as the published evaluation does.
        progress: Called during every longer step.

    Returns:
        What was measured.
    """
    decide = find_judge(judge)
    prompter = Prompter.of(model, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)
    with frozen(model):
        given, verdicts = answer_edits(
            model,
            prompter,
            edits,
            judge=decide,
            base=base_answers,
            stop_at_period=stop_at_period,
            progress=progress,
        )
        sums = None
        if texts:
            own = logits_of(model)
            sums = drift_of_texts(base or own, own, text_batches(model, tokenizer, texts), progress=progress)
        return Evaluation(
            edits=_scores(questions(edits), verdicts),
            texts=sums,
            has_base=base is not None,
            tasks=bundled_items(model, prompter, progress=progress) if tasks else {},
            answers=given,
            verdicts=verdicts,
        )


def measure_both(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    base: Any,
    texts: Sequence[str] | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> tuple[Evaluation, Evaluation]:
    """Evaluates a model and its base on the same items: what paired differences and a report are made from.

    Args:
        model: The edited model.
        tokenizer: Its tokenizer; the base is asked through it too.
        edits: What to ask about.
        base: The model before editing.
        texts: Texts for drift and both losses, which one pass measures.
        progress: Called during every longer step.
        **options: See :func:`measure`.

    Returns:
        What was measured of the model, and of the base: it agrees with itself where the edits say no answer, and has
        no drift.

    Raises:
        ModelError: ``base`` has another vocabulary.
    """
    check_vocabularies(base, model)

    def of_base(what: str, done: int, total: int) -> None:
        progress(f"base: {what}", done, total)

    before = measure(base, tokenizer, edits, progress=of_base, **options)
    after = measure(
        model,
        tokenizer,
        edits,
        base=logits_of(base),
        base_answers=before.answers,
        texts=texts,
        progress=progress,
        **options,
    )
    sums = after.texts.of_base() if after.texts is not None else None
    return after, replace(agreeing(before, edits), texts=sums, has_base=True)


def agreeing(base: Evaluation, edits: Sequence[Edit]) -> Evaluation:
    """A base model's evaluation in which its own answers are right where the edits name none."""
    asked = questions(edits)
    verdicts = {
        context: [True if q.expected is None else verdict for q, verdict in zip(asked, of_context, strict=True)]
        for context, of_context in base.verdicts.items()
    }
    return replace(base, edits=_scores(asked, verdicts), verdicts=verdicts)


def _scores(asked: Sequence[Question], verdicts: dict[str, list[Verdict]]) -> dict[str, Items]:
    """By context, the scores of every edit."""
    return {context: verdict_items(asked, of_context) for context, of_context in verdicts.items()}


def check_vocabularies(base: Any, model: Any) -> None:
    """Raises :class:`ModelError` unless both models are over vocabularies of one size."""
    if base.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise ModelError("base and model have vocabularies of different sizes; drift between them is not defined")


def evaluate(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    base: Any = None,
    texts: Sequence[str] | None = None,
    tasks: bool = False,
    judge: str = "exact",
    chat: Chat = "auto",
    stop_at_period: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Evaluates a model on edits, freely answering with and without context, and on its capabilities.

    Args:
        model: The model, edited or not.
        tokenizer: Its tokenizer.
        edits: What to ask about.
        base: The model before editing, for drift and for locality prompts without an answer.
        texts: Texts for drift and capability loss; all of them are used.
        tasks: Whether to run the bundled world's five tasks.
        judge: ``exact`` or ``contains``.
        chat: Whether prompts go through the chat template.
        stop_at_period: Also cut answers at the first period, as the published evaluation does.
        progress: Called during every longer step.

    Returns:
        ``no_context`` and ``qa_context`` (reliability, generalization, locality in percent or ``None``),
        ``teacher_forced`` (``None``: not measured), ``capability`` (drift in nats per token, losses, tasks).
    """
    decide = find_judge(judge)
    base_answers = None
    if base is not None:
        check_vocabularies(base, model)
        if any(near.answer is None for edit in edits for near in edit.locality):
            prompter = Prompter.of(model, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)
            with frozen(base):
                base_answers, _ = answer_edits(base, prompter, edits, judge=decide, progress=progress)
    return measure(
        model,
        tokenizer,
        edits,
        base=logits_of(base) if base is not None else None,
        base_answers=base_answers,
        texts=texts,
        tasks=tasks,
        judge=judge,
        chat=chat,
        stop_at_period=stop_at_period,
        progress=progress,
    ).summary()
