"""``evaluate``: everything that is measured of a model, in the one JSON shape that all commands use."""

from collections.abc import Sequence
from typing import Any

from .capability import bundled_tasks, logits_of, measure_drift
from .edits import Edit
from .errors import ModelError
from .judge import find_judge
from .models import frozen
from .progress import Progress, no_progress
from .rows import Chat, Prompter
from .texts import text_batches
from .wild import evaluate_edits


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

    Raises:
        ModelError: ``base`` has another vocabulary.
    """
    decide = find_judge(judge)
    prompter = Prompter.of(model, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)
    if base is not None and base.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise ModelError("base and model have vocabularies of different sizes; drift between them is not defined")
    capability: dict[str, Any] = {"drift": None, "loss_base": None, "loss": None, "tasks": {}}
    base_answers = None
    with frozen(model):
        if base is not None and any(near.answer is None for edit in edits for near in edit.locality):
            _, base_answers = evaluate_edits(base, prompter, edits, judge=decide, progress=progress)
        scores, _ = evaluate_edits(
            model, prompter, edits, judge=decide, base=base_answers, stop_at_period=stop_at_period, progress=progress
        )
        if texts:
            batches = text_batches(model, tokenizer, texts)
            logits = logits_of(model)
            measured = measure_drift(
                logits_of(base) if base is not None else logits, logits, batches, progress=progress
            )
            capability["loss"] = measured.loss
            if base is not None:
                capability |= {"drift": measured.drift, "loss_base": measured.loss_base}
        if tasks:
            capability["tasks"] = bundled_tasks(model, prompter, progress=progress)
    return {**scores, "teacher_forced": None, "capability": capability}
