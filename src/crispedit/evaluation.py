"""``evaluate``: everything that is measured of a model, in the one JSON shape that all commands use."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .capability import Logits, TaskItems, TextSums, bundled_items, drift_of_texts, logits_of
from .edits import Edit
from .errors import ModelError
from .judge import Judge, Judged, find_judge
from .live import LiveModel
from .models import frozen
from .progress import Progress, no_progress
from .rows import Chat, Prompter
from .texts import text_batches
from .wild import Items, answer_questions, judge_answers, mean_scores, questions


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of a model, item by item: what intervals are computed from.

    Args:
        edits: By context, the scores of every edit (:func:`crispedit.wild.score_items`).
        texts: Drift and losses by text, where there were texts.
        has_base: Whether they were compared with a base model.
        tasks: By task, where there were tasks; ``None`` where none could be run.
        answers: By context, the answers to all questions about the edits.
        judged: What the judge made of these answers.
    """

    edits: dict[str, Items]
    texts: TextSums | None
    has_base: bool
    tasks: dict[str, TaskItems] | None
    answers: dict[str, list[str]]
    judged: Judged

    def summary(self) -> dict[str, Any]:
        """The means, as ``crispedit evaluate`` writes them."""
        capability: dict[str, Any] = {"drift": None, "loss_base": None, "loss": None}
        if self.texts is not None:
            means = asdict(self.texts.means())
            capability = means if self.has_base else {**capability, "loss": means["loss"]}
        tasks = self.tasks
        capability["tasks"] = None if tasks is None else {name: items.score for name, items in tasks.items()}
        scores = {context: mean_scores(items) for context, items in self.edits.items()}
        return {**scores, "teacher_forced": None, "judge": self.judged.record(), "capability": capability}


def measure(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    base: Logits | None = None,
    base_answers: dict[str, list[str]] | None = None,
    texts: Sequence[str] | None = None,
    tasks: bool = False,
    judge: str | Judge = "exact",
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
        judge: ``exact``, ``contains``, or another judge (:class:`crispedit.llm_judge.LlmJudge`).
        chat: Whether prompts go through the chat template.
        stop_at_period: Also cut answers at the first period, as the published evaluation does.
        progress: Called during every longer step.

    Returns:
        What was measured.
    """
    decide = find_judge(judge) if isinstance(judge, str) else judge
    asked = questions(edits)
    prompter = Prompter.of(model, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)
    with frozen(model):
        given = answer_questions(model, prompter, asked, stop_at_period=stop_at_period, progress=progress)
        sums = None
        if texts:
            own = logits_of(model)
            sums = drift_of_texts(base or own, own, text_batches(model, tokenizer, texts), progress=progress)
        of_tasks = bundled_items(model, prompter, progress=progress) if tasks else {}
    items, judged = judge_answers(asked, given, decide, base_answers, progress=progress)
    return Evaluation(edits=items, texts=sums, has_base=base is not None, tasks=of_tasks, answers=given, judged=judged)


def evaluate(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    base: Any = None,
    texts: Sequence[str] | None = None,
    tasks: bool = False,
    judge: str | Judge = "exact",
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
        judge: ``exact``, ``contains``, or another judge (:class:`crispedit.llm_judge.LlmJudge`).
        chat: Whether prompts go through the chat template.
        stop_at_period: Also cut answers at the first period, as the published evaluation does.
        progress: Called during every longer step.

    Returns:
        ``no_context`` and ``qa_context`` (reliability, generalization, locality in percent or ``None``),
        ``teacher_forced`` (``None``: not measured), ``judge`` (its name and model, how many answers there were, how
        many it did not judge, its agreement with exact match), ``capability`` (drift in nats per token, losses, tasks).

    Raises:
        ModelError: ``base`` has another vocabulary.
    """
    if isinstance(judge, str):
        judge = find_judge(judge)
    base_answers = None
    if base is not None:
        if base.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
            raise ModelError("base and model have vocabularies of different sizes; drift between them is not defined")
        if needs_base_answers(edits):
            options: dict[str, Any] = {"chat": chat, "stop_at_period": stop_at_period, "progress": progress}
            base_answers = answers_of_base(base, tokenizer, edits, **options)
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


def needs_base_answers(edits: Sequence[Edit]) -> bool:
    """Whether there is a locality prompt without an answer: right is then what the base model says."""
    return any(near.answer is None for edit in edits for near in edit.locality)


def answers_of_base(
    base: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    chat: Chat = "auto",
    stop_at_period: bool = False,
    progress: Progress = no_progress,
) -> dict[str, list[str]]:
    """The base model's answers to everything that is asked about the edits, by context; options as in :func:`evaluate`.

    Returns:
        The answers.
    """
    prompter = Prompter.of(base, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)
    with frozen(base):
        return answer_questions(base, prompter, questions(edits), stop_at_period=stop_at_period, progress=progress)


def evaluate_live(
    live: LiveModel,
    edits: Sequence[Edit],
    *,
    base_answers: dict[str, list[str]] | None = None,
    judge: str | Judge = "exact",
    stop_at_period: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Evaluates a model behind a server on edits: free answers with and without context, and nothing else of it.

    Args:
        live: The model.
        edits: What to ask about.
        base_answers: Of the model before editing, for locality prompts without an answer (:func:`answers_of_base`).
        judge: As in :func:`evaluate`.
        stop_at_period: As there.
        progress: Called after every answer.

    Returns:
        As :func:`evaluate`, where drift, losses and tasks are ``None``; and ``endpoint``, which says who answered.
    """
    decide = find_judge(judge) if isinstance(judge, str) else judge
    asked = questions(edits)
    given = live.answer_questions(asked, stop_at_period=stop_at_period, progress=progress)
    items, judged = judge_answers(asked, given, decide, base_answers, progress=progress)
    found = Evaluation(edits=items, texts=None, has_base=False, tasks=None, answers=given, judged=judged)
    return {**found.summary(), "endpoint": live.about()}
