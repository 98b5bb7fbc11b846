"""``crispedit train-mend``, from names and paths to a directory."""

from functools import partial
from pathlib import Path
from typing import Any

from .editors._meta import lessons, train_in_directory
from .editors.mend import Config as MendConfig
from .errors import ConfigError
from .inputs import capability_texts, read_edits
from .models import frozen, load_model, parse_layers, tokenizer_hash
from .precision import float32_masters
from .progress import Progress, no_progress
from .rows import Prompter


def train_mend_job(
    model: str,
    train_edits: str,
    out: Path,
    *,
    settings: dict[str, Any],
    layers: str | None = None,
    texts: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: str = "auto",
    conflicts: str = "error",
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """``crispedit train-mend``: trains the hypernetwork of editor mend, or goes on with a training.

    Args:
        model: That will be edited.
        train_edits: Path or bundled split; not the edits to be made.
        out: Directory for the network.
        settings: Of the editor.
        layers: Decoder blocks to edit.
        texts: Capability texts, for train edits without locality prompts.
        limit: The first N edits.
        seed: Of everything drawn at random.
        chat: Whether prompts go through the chat template.
        conflicts: What to do with one prompt and several targets.
        overwrite: Whether another training in the directory is replaced.
        options: For :func:`crispedit.models.load_model`.
        progress: Called after every step.

    Returns:
        The record of the training.

    Raises:
        ConfigError: The settings name a network.
    """
    config = MendConfig.of(settings)
    if config.network is not None:
        raise ConfigError("train-mend makes a network; leave --set network out")
    chosen = parse_layers(layers) if layers is not None else None
    edit_set = read_edits(train_edits, limit=limit, conflicts=conflicts)
    divided = capability_texts(model, texts, None, seed)
    loaded = load_model(model, **(options or {}), edited=partial(config.matrices, layers=chosen))
    matrices = config.matrices(loaded.model, chosen)
    prompter = Prompter.of(loaded.model, loaded.tokenizer, chat=chat, eos=config.eos)  # type: ignore[arg-type]
    about = {
        "model": model,
        "train_edits": {"source": edit_set.source, "sha256": edit_set.sha256, "count": len(edit_set)},
        "texts": divided.manifest() if divided is not None else None,
        "tokenizer": tokenizer_hash(loaded.tokenizer),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "chat": chat,
        "eos": config.eos,
    }
    with frozen(loaded.model), float32_masters(matrices):
        return train_in_directory(
            out,
            loaded.model,
            matrices,
            lessons(loaded.model, prompter, edit_set, divided, seed),
            config.meta(matrices, seed),
            about,
            overwrite=overwrite,
            progress=progress,
        )
