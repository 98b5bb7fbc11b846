"""``evaluate``: everything that is measured of a model, in the one JSON shape that all commands use."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from .capability import Logits, TaskItems, TextSums, bundled_items, drift_of_texts, logits_of
from .edits import Edit
from .errors import ConfigError, ModelError, did_you_mean
from .generation import Ids
from .judge import Judge, Judged, Verdict, find_judge
from .live import LiveModel
from .models import frozen
from .progress import Progress, no_progress
from .rows import Chat, EditRow, Prompter
from .teacher_forced import TeacherForced, locality_choices, teacher_force
from .texts import text_batches
from .wild import CONTEXTS, Items, answer_questions, items_of, judge_answers, mean_scores, questions

Protocol = Literal["wild", "teacher-forced", "all"]
"""``wild``: free answers; ``teacher-forced``: token by token, everything before being given; ``all``: both."""


def check_protocol(protocol: str) -> None:
    """Refuses a protocol that there is not.

    Args:
        protocol: Its name.

    Raises:
        ConfigError: There is none of that name.
    """
    names = get_args(Protocol)
    if protocol not in names:
        wanted = f"{', '.join(names[:-1])} or {names[-1]}"
        raise ConfigError(f"protocol is '{protocol}'; it must be {wanted}{did_you_mean(protocol, names)}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of a model, item by item: what intervals are computed from.

    Args:
        edits: By context, the scores of every edit (:func:`crispedit.wild.items_of`); empty without free answers.
        texts: Drift and losses by text, where there were texts.
        has_base: Whether they were compared with a base model.
        tasks: By task, where there were tasks; ``None`` where none could be run.
        answers: By context, the answers to all questions about the edits.
        verdicts: By context, whether these are right.
        judged: What the judge made of these answers.
        forced: Teacher-forced scores, where they were measured.
    """

    edits: dict[str, Items]
    texts: TextSums | None
    has_base: bool
    tasks: dict[str, TaskItems] | None
    answers: dict[str, list[str]]
    verdicts: dict[str, list[Verdict]]
    judged: Judged | None
    forced: TeacherForced | None = None

    def items(self, count: int) -> dict[str, Any]:
        """What was measured item by item, JSON-ready.

        Args:
            count: How many edits there are.

        Returns:
            ``edits``: by context, or ``teacher_forced``, and kind, a list over all edits (``None`` where there is no
            score); ``tasks``, by name; ``texts``, the sums of each, or ``None``.
        """
        scores = dict(self.edits)
        if self.forced is not None:
            scores["teacher_forced"] = {**self.forced.items, **self.forced.beside}
        return {
            "edits": {
                context: {kind: [of_kind.get(edit) for edit in range(count)] for kind, of_kind in items.items()}
                for context, items in scores.items()
            },
            "tasks": {name: asdict(items) for name, items in (self.tasks or {}).items()},
            "texts": {name: values.tolist() for name, values in vars(self.texts).items()} if self.texts else None,
        }

    def summary(self) -> dict[str, Any]:
        """The means, as ``crispedit evaluate`` writes them."""
        capability: dict[str, Any] = {"drift": None, "loss_base": None, "loss": None}
        if self.texts is not None:
            means = asdict(self.texts.means())
            capability = means if self.has_base else {**capability, "loss": means["loss"]}
        tasks = self.tasks
        capability["tasks"] = None if tasks is None else {name: items.score for name, items in tasks.items()}
        found: dict[str, Any] = {
            context: mean_scores(self.edits[context]) if context in self.edits else None for context in CONTEXTS
        }
        found["teacher_forced"] = mean_scores(self.forced.items) if self.forced is not None else None
        if self.forced is not None:
            found["teacher_forced_details"] = self.forced.details()
        return {**found, "judge": self.judged.record() if self.judged else None, "capability": capability}


def measure(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    base: Logits | None = None,
    base_answers: dict[str, list[str]] | None = None,
    base_choices: Mapping[EditRow, Ids] | None = None,
    protocol: Protocol = "wild",
    texts: Sequence[str] | None = None,
    tasks: bool = False,
    judge: str | Judge = "exact",
    chat: Chat = "auto",
    stop_at_period: bool = False,
    progress: Progress = no_progress,
) -> Evaluation:
    """Evaluates a model on edits, answering freely or teacher-forced, and on its capabilities.

    Args:
        model: The model, edited or not.
        tokenizer: Its tokenizer.
        edits: What to ask about.
        base: Logits of the model before editing, for drift.
        base_answers: Its answers, for locality prompts without an answer.
        base_choices: Its choices at the tokens of locality answers (:func:`crispedit.teacher_forced.locality_choices`),
            for agreement.
        protocol: How edits are asked about: ``wild``, ``teacher-forced`` or ``all``.
        texts: Texts for drift and capability loss; all of them are used.
        tasks: Whether to run the bundled world's five tasks.
        judge: ``exact``, ``contains``, or another judge (:class:`crispedit.llm_judge.LlmJudge`).
        chat: Whether prompts go through the chat template.
        stop_at_period: Judge what the published stop rule leaves of an answer (:mod:`crispedit.generation`).
        progress: Called during every longer step.

    Returns:
        What was measured.
    """
    decide = find_judge(judge) if isinstance(judge, str) else judge
    check_protocol(protocol)
    asked = questions(edits)
    prompter = Prompter.of(model, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)
    given: dict[str, list[str]] = {}
    forced = sums = None
    with frozen(model):
        if protocol != "teacher-forced":
            given = answer_questions(model, prompter, asked, stop_at_period=stop_at_period, progress=progress)
        if protocol != "wild":
            forced = teacher_force(model, tokenizer, edits, base=base_choices, chat=chat, progress=progress)
        if texts:
            own = logits_of(model)
            sums = drift_of_texts(base or own, own, text_batches(model, tokenizer, texts), progress=progress)
        of_tasks = bundled_items(model, prompter, progress=progress) if tasks else {}
    verdicts, judged = judge_answers(asked, given, decide, base_answers, progress=progress)
    return Evaluation(
        edits={context: items_of(asked, of_context) for context, of_context in verdicts.items()},
        texts=sums,
        has_base=base is not None,
        tasks=of_tasks,
        answers=given,
        verdicts=verdicts,
        judged=judged if given else None,
        forced=forced,
    )


def measure_both(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    base: Any,
    protocol: Protocol = "wild",
    texts: Sequence[str] | None = None,
    chat: Chat = "auto",
    progress: Progress = no_progress,
    **options: Any,
) -> tuple[Evaluation, Evaluation]:
    """Evaluates a model and its base on the same items: what paired differences and a report are made from.

    Args:
        model: The edited model.
        tokenizer: Its tokenizer; the base is asked through it too.
        edits: What to ask about.
        base: The model before editing.
        protocol: See :func:`measure`.
        texts: Texts for drift and both losses, which one pass measures.
        chat: See :func:`measure`.
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

    shared: dict[str, Any] = {"protocol": protocol, "chat": chat, **options}
    choices = None
    if protocol != "wild":
        with frozen(base):
            choices = locality_choices(base, tokenizer, edits, chat=chat, progress=of_base)
    before = measure(base, tokenizer, edits, base_choices=choices, progress=of_base, **shared)
    after = measure(
        model,
        tokenizer,
        edits,
        base=logits_of(base),
        base_answers=before.answers or None,
        base_choices=choices,
        texts=texts,
        progress=progress,
        **shared,
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
    items = {context: items_of(asked, of_context) for context, of_context in verdicts.items()}
    return replace(base, edits=items, verdicts=verdicts)


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
    protocol: Protocol = "wild",
    texts: Sequence[str] | None = None,
    tasks: bool = False,
    judge: str | Judge = "exact",
    chat: Chat = "auto",
    stop_at_period: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Evaluates a model on edits, answering freely or teacher-forced, and on its capabilities.

    Args:
        model: The model, edited or not.
        tokenizer: Its tokenizer.
        edits: What to ask about.
        base: The model before editing, for drift, for locality prompts without an answer, and for agreement.
        protocol: How edits are asked about: ``wild`` (free greedy answers), ``teacher-forced`` or ``all``.
        texts: Texts for drift and capability loss; all of them are used.
        tasks: Whether to run the bundled world's five tasks.
        judge: ``exact``, ``contains``, or another judge (:class:`crispedit.llm_judge.LlmJudge`).
        chat: Whether prompts go through the chat template.
        stop_at_period: Judge what the published stop rule leaves of an answer (:mod:`crispedit.generation`).
        progress: Called during every longer step.

    Returns:
        ``no_context``, ``qa_context`` and ``teacher_forced`` (reliability, generalization, locality in percent or
        ``None``; ``None`` for what ``protocol`` leaves out), ``judge`` (its name and model, how many answers there
        were, how many it did not judge, its agreement with exact match), ``capability`` (drift in nats per token,
        losses, tasks); with ``teacher_forced`` also ``teacher_forced_details``: what ``locality`` is there, and in
        percent or ``None`` ``agreement`` with the base, ``efficacy`` and ``paraphrase_efficacy``
        (:mod:`crispedit.teacher_forced`).
    """
    check_protocol(protocol)
    base_answers = base_choices = None
    if base is not None:
        check_vocabularies(base, model)
        if protocol != "teacher-forced" and needs_base_answers(edits):
            options: dict[str, Any] = {"chat": chat, "stop_at_period": stop_at_period, "progress": progress}
            base_answers = answers_of_base(base, tokenizer, edits, **options)
        if protocol != "wild":
            with frozen(base):
                base_choices = locality_choices(base, tokenizer, edits, chat=chat, progress=progress)
    return measure(
        model,
        tokenizer,
        edits,
        base=logits_of(base) if base is not None else None,
        base_answers=base_answers,
        base_choices=base_choices,
        protocol=protocol,
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
) -> Evaluation:
    """Evaluates a model behind a server on edits: free answers with and without context, and nothing else of it.

    Args:
        live: The model.
        edits: What to ask about.
        base_answers: Of the model before editing, for locality prompts without an answer (:func:`answers_of_base`).
        judge: As in :func:`evaluate`.
        stop_at_period: As there.
        progress: Called after every answer.

    Returns:
        What was measured; there are no texts and no tasks.
    """
    decide = find_judge(judge) if isinstance(judge, str) else judge
    asked = questions(edits)
    given = live.answer_questions(asked, stop_at_period=stop_at_period, progress=progress)
    verdicts, judged = judge_answers(asked, given, decide, base_answers, progress=progress)
    return Evaluation(
        edits={context: items_of(asked, of_context) for context, of_context in verdicts.items()},
        texts=None,
        has_base=False,
        tasks=None,
        answers=given,
        verdicts=verdicts,
        judged=judged,
    )
