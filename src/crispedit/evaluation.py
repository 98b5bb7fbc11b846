"""``evaluate``: everything that is measured of a model, in the one JSON shape that all commands use."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from .capability import Logits, TaskItems, TextSums, bundled_items, drift_of_texts, logits_of
from .edits import Edit
from .errors import ConfigError, ModelError, did_you_mean
from .generation import Ids
from .judge import find_judge
from .models import frozen
from .progress import Progress, no_progress
from .rows import Chat, EditRow, Prompter
from .teacher_forced import TeacherForced, locality_choices, teacher_force
from .texts import text_batches
from .wild import CONTEXTS, Items, answer_edits, mean_scores

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
        edits: By context, the scores of every edit (:func:`crispedit.wild.score_items`); empty without free answers.
        texts: Drift and losses by text, where there were texts.
        has_base: Whether they were compared with a base model.
        tasks: By task, where there were tasks.
        answers: By context, the answers to all questions about the edits.
        forced: Teacher-forced scores, where they were measured.
    """

    edits: dict[str, Items]
    texts: TextSums | None
    has_base: bool
    tasks: dict[str, TaskItems] = field(default_factory=dict)
    answers: dict[str, list[str]]
    forced: TeacherForced | None = None

    def summary(self) -> dict[str, Any]:
        """The means, as ``crispedit evaluate`` writes them."""
        capability: dict[str, Any] = {"drift": None, "loss_base": None, "loss": None}
        if self.texts is not None:
            means = asdict(self.texts.means())
            capability = means if self.has_base else {**capability, "loss": means["loss"]}
        capability["tasks"] = {name: items.score for name, items in self.tasks.items()}
        found: dict[str, Any] = {
            context: mean_scores(self.edits[context]) if context in self.edits else None for context in CONTEXTS
        }
        found["teacher_forced"] = mean_scores(self.forced.items) if self.forced is not None else None
        if self.forced is not None:
            found["teacher_forced_details"] = self.forced.details()
        return {**found, "capability": capability}


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
    judge: str = "exact",
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
        judge: ``exact`` or ``contains``.
        chat: Whether prompts go through the chat template.
        stop_at_period: Judge what the published stop rule leaves of an answer (:mod:`crispedit.generation`).
        progress: Called during every longer step.

    Returns:
        What was measured.
    """
    decide = find_judge(judge)
    prompter = Prompter.of(model, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)
    check_protocol(protocol)
    items: dict[str, Items] = {}
    given: dict[str, list[str]] = {}
    forced = sums = None
    with frozen(model):
        if protocol != "teacher-forced":
            items, given = answer_edits(
                model,
                prompter,
                edits,
                judge=decide,
                base=base_answers,
                stop_at_period=stop_at_period,
                progress=progress,
            )
        if protocol != "wild":
            forced = teacher_force(model, tokenizer, edits, base=base_choices, chat=chat, progress=progress)
        if texts:
            own = logits_of(model)
            sums = drift_of_texts(base or own, own, text_batches(model, tokenizer, texts), progress=progress)
        return Evaluation(
            edits=items,
            texts=sums,
            has_base=base is not None,
            tasks=bundled_items(model, prompter, progress=progress) if tasks else {},
            answers=given,
            forced=forced,
        )


def evaluate(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    base: Any = None,
    protocol: Protocol = "wild",
    texts: Sequence[str] | None = None,
    tasks: bool = False,
    judge: str = "exact",
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
        judge: ``exact`` or ``contains``.
        chat: Whether prompts go through the chat template.
        stop_at_period: Judge what the published stop rule leaves of an answer (:mod:`crispedit.generation`).
        progress: Called during every longer step.

    Returns:
        ``no_context``, ``qa_context`` and ``teacher_forced`` (reliability, generalization, locality in percent or
        ``None``; ``None`` for what ``protocol`` leaves out), ``capability`` (drift in nats per token, losses, tasks);
        with ``teacher_forced`` also ``teacher_forced_details``: what ``locality`` is there, and in percent or ``None``
        ``agreement`` with the base, ``efficacy`` and ``paraphrase_efficacy`` (:mod:`crispedit.teacher_forced`).

    Raises:
        ModelError: ``base`` has another vocabulary.
    """
    decide = find_judge(judge)
    check_protocol(protocol)
    base_answers = base_choices = None
    if base is not None:
        if base.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
            raise ModelError("base and model have vocabularies of different sizes; drift between them is not defined")
        if protocol != "teacher-forced" and any(near.answer is None for edit in edits for near in edit.locality):
            prompter = Prompter.of(model, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)
            with frozen(base):
                _, base_answers = answer_edits(
                    base, prompter, edits, judge=decide, stop_at_period=stop_at_period, progress=progress
                )
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
