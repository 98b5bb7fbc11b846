"""How MEND's hypernetwork is trained, and the directory in which it is kept.

    minimise over φ    c_edit · (−log p_{W'}(y | x'))  +  c_loc · KL(p_W ‖ p_{W'})      W' = W − α ∇̃W(x, y; φ)

on edits (x, y) that are not those to be made: x' is a rephrase of x where there is one, and the KL divergence is taken
where other prompts are answered. x' and the other prompts meet W', and the pairs that ∇̃W is made of are those at W, so
that the gradient in φ is exact with one backward pass. (MEND, arXiv 2110.11309, algorithm 1.)
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..artifacts import check_writable, read_json, write_json, write_tensors
from ..edits import Edit
from ..errors import ArtifactError, ConfigError, NumericsError
from ..forward import RowBatch, collate, target_logits
from ..models import EditMatrix, context_length, fingerprint
from ..progress import Progress, log, no_progress
from ..rows import EditRow, Prompter
from ..texts import CapabilityTexts
from ._capture import RunningMoments, capture
from ._hypernetwork import Hypernetwork, LowRankUpdate, applied

RECORD, TENSORS = "mend.json", "network.safetensors"
SAVE_STEPS = 50
"""A training with a directory saves its state after so many steps."""
TEXT_TOKENS = 64
"""Of a capability text that stands in for locality prompts."""
SCORED = 64
"""Of more edits than that in a step, so many are looked at in the model that they make."""
CHECKED = 64
"""Train edits, at most a tenth of them, that are kept from training to say how well it went."""


@dataclass(frozen=True, kw_only=True)
class MetaSettings:
    """How a hypernetwork is made and trained; see :class:`crispedit.editors.mend.Config`."""

    rank: int
    step_size: float
    lr: float
    step_size_lr: float
    edit_weight: float
    locality_weight: float
    clip: float
    steps: int
    edits_per_step: int
    edits_per_update: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One train edit.

    Args:
        row: What is taught.
        asked: Rows on which the edit should show: rephrases, else the row itself.
        kept: Rows whose answers must stay.
    """

    row: EditRow
    asked: tuple[EditRow, ...]
    kept: tuple[EditRow, ...]


def lessons(
    model: Any, prompter: Prompter, edits: Sequence[Edit], texts: CapabilityTexts | None, seed: int
) -> list[Lesson]:
    """Train edits as rows.

    Args:
        model: The causal LM.
        prompter: Builds rows.
        edits: The train edits.
        texts: Capability texts, in place of locality prompts where an edit has none.
        seed: Of the texts that an edit gets.

    Returns:
        One lesson per edit.

    Raises:
        ConfigError: An edit has no locality prompt, and there are no texts.
    """
    context = context_length(model)
    rng = random.Random(f"{seed}/texts")
    found = []
    for edit, row in zip(edits, prompter.rows(edits, context), strict=True):
        rephrased = [replace(edit, prompt=text, turns=()) for text in edit.rephrases]
        if edit.locality:
            kept = [_kept(prompter, near.prompt, near.answer, edit.row) for near in edit.locality]
        elif texts is not None:
            ids = prompter.tokenizer(rng.choice(texts.fit), truncation=True, max_length=TEXT_TOKENS)["input_ids"]
            kept = [EditRow(tuple(ids), 1)] if len(ids) > 1 else []
        else:
            raise ConfigError(
                f"train edit {edit.row} has no locality prompt to learn from what must stay: give --texts, or "
                "'locality_prompt' in every row"
            )
        asked = prompter.rows(rephrased, context) if rephrased else [row]
        found.append(Lesson(row=row, asked=tuple(asked), kept=tuple(kept)))
    return found


def _kept(prompter: Prompter, prompt: str, answer: str | None, row: int) -> EditRow:
    """A locality prompt with its answer; without one, only the first token of an answer is looked at."""
    if answer is not None:
        return prompter.row(Edit(prompt=prompt, target=answer, row=row))
    ids = prompter.prompt(prompt)
    return EditRow((*ids, ids[-1]), len(ids))  # what stands last is never fed


class Meta:
    """A hypernetwork in training: the network, its optimizer, and where it is.

    Args:
        model: The causal LM, frozen, with its original weights.
        matrices: What will be edited, inside :func:`crispedit.precision.float32_masters`.
        taught: Lessons.
        settings: How it is trained.
    """

    def __init__(
        self, model: Any, matrices: Sequence[EditMatrix], taught: Sequence[Lesson], settings: MetaSettings
    ) -> None:
        self.model, self.matrices, self.settings = model, matrices, settings
        held_out = min(CHECKED, len(taught) // 10)
        self.checked, self.taught = taught[:held_out], taught[held_out:]
        shapes = [matrix.shape for matrix in matrices]
        self.network = Hypernetwork(shapes, settings.rank, settings.step_size, settings.seed)
        self.network.to(matrices[0].parameter.device)
        others = [p for name, p in self.network.named_parameters() if name != "step_sizes"]
        self.optimizer = torch.optim.Adam(
            [
                {"params": others, "lr": settings.lr},
                {"params": [self.network.step_sizes], "lr": settings.step_size_lr * settings.step_size},
            ]
        )
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.whole = True

    def fit_moments(self, progress: Progress) -> None:
        """Mean and standard deviation of the factors of all train edits: at the original weights they never change."""
        moments: dict[tuple[int, int], RunningMoments] = {}
        for first in range(0, len(self.taught), 32):
            rows = [lesson.row for lesson in self.taught[first : first + 32]]
            for name, factors in capture(self.model, self.matrices, rows, tokens="all").factors.items():
                shape = next(matrix.shape for matrix in self.matrices if matrix.name == name)
                used = (factors.inputs != 0).any(1) & (factors.gradients != 0).any(1)
                joined = factors.joined[used]
                moments.setdefault(shape, RunningMoments(sum(shape), joined.device)).update(joined)
            progress("statistics of train edits", min(first + 32, len(self.taught)), len(self.taught))
        self.network.set_moments(moments)

    def chosen(self, step: int) -> list[Lesson]:
        """The lessons of a step: every epoch goes through all of them in an order of its own."""
        count, size = len(self.taught), self.settings.edits_per_step
        positions = range(step * size, (step + 1) * size)
        epochs = {position // count for position in positions}
        orders = {e: random.Random(f"{self.settings.seed}/{e}").sample(range(count), count) for e in epochs}
        return [self.taught[orders[position // count][position % count]] for position in positions]

    def losses(self, taught: Sequence[Lesson], rng: random.Random, together: int) -> tuple[Tensor, Tensor]:
        """Edit loss and KL divergence of some lessons, each a mean over target tokens.

        Args:
            taught: The lessons.
            rng: Chooses a rephrase and a locality prompt of each.
            together: So many after one another make one update.

        Returns:
            Two scalars with a graph into the network.
        """
        group = torch.arange(len(taught)) // together
        factors = capture(self.model, self.matrices, [lesson.row for lesson in taught], tokens="all").factors
        updates = [self.network.update(index, factors[m.name], group) for index, m in enumerate(self.matrices)]
        if len(taught) > SCORED:  # all of them make the update, and some say how good it is
            some = sorted(rng.sample(range(len(taught)), SCORED))
            taught, group = [taught[index] for index in some], group[some]
        asked = [rng.choice(lesson.asked) for lesson in taught]
        kept = [rng.choice(lesson.kept) for lesson in taught if lesson.kept]
        groups = torch.cat([group, torch.tensor([g for g, x in zip(group.tolist(), taught, strict=True) if x.kept])])
        batch = collate([*asked, *kept]).to(self.model.get_input_embeddings().weight.device)
        logits = self._logits(batch, updates, groups.long())
        num_asked = sum(row.num_targets for row in asked)
        labels = batch.labels.to(logits.device)
        edit_loss = nn.functional.cross_entropy(logits[:num_asked], labels[:num_asked])
        if not kept:
            return edit_loss, logits.new_zeros(())
        with torch.no_grad():
            before = collate(kept).to(batch.ids.device)
            base = target_logits(self.model, before).to(logits.dtype).log_softmax(-1)
        after = logits[num_asked:].log_softmax(-1)
        return edit_loss, (base.exp() * (base - after)).sum(-1).mean()

    def _logits(self, batch: RowBatch, updates: Sequence[LowRankUpdate], groups: Tensor) -> Tensor:
        """Logits at targets, each row in the model that its group's update makes."""
        with applied(self.matrices, updates, batch, groups):
            logits = target_logits(self.model, batch)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.enable_grad()
    def advance(self) -> None:
        """One step of Adam.

        Raises:
            NumericsError: A loss is not finite.
        """
        settings = self.settings
        rng = random.Random(f"{settings.seed}/step {self.step}")
        edit_loss, divergence = self.losses(self.chosen(self.step), rng, settings.edits_per_update)
        loss = settings.edit_weight * edit_loss + settings.locality_weight * divergence
        value = [float(edit_loss.detach()), float(divergence.detach())]
        if not torch.isfinite(loss.detach()):
            raise NumericsError(
                f"the hypernetwork's loss is {value[0]:g} + {value[1]:g} in step {self.step + 1}; lower lr or step_size"
            )
        parameters = self._parameters()  # and not what else requires a gradient, the matrices
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        self.whole = False  # an interruption in here leaves a step that only some parameters have taken
        self.optimizer.step()
        self.step += 1
        self.history.append({"edit_loss": value[0], "divergence": value[1]})
        self.whole = True

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Mean losses on the train edits that were kept from training."""
        if not self.checked:
            return {}
        rng = random.Random(f"{self.settings.seed}/check")
        totals, together = [0.0, 0.0], self.settings.edits_per_update
        for first in range(0, len(self.checked), max(together, 8)):
            some = self.checked[first : first + max(together, 8)]
            for number, value in enumerate(self.losses(some, rng, together)):
                totals[number] += float(value) * len(some) / len(self.checked)
        return {"edit_loss": totals[0], "divergence": totals[1]}

    def report(self) -> dict[str, Any]:
        """What a user may want to know of a training, JSON-ready: losses in the first and the last tenth of it."""
        tenth = max(1, len(self.history) // 10)
        parts = {"first": self.history[:tenth], "last": self.history[-tenth:]}
        means = {
            name: {loss: sum(step[loss] for step in part) / len(part) for loss in part[0]}
            for name, part in parts.items()
            if part
        }
        return {
            "steps": self.step,
            "train_edits": len(self.taught),
            "losses": means,
            "held_out_edits": len(self.checked),
            "held_out": self.check(),
            "step_sizes": self.network.step_sizes.tolist(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """All that training goes on from; of one that is finished, the network."""
        found = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        for index, parameter in enumerate(self._parameters() if self.step < self.settings.steps else []):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                found[f"adam/{index}/{name}"] = value
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def save(self, path: Path, key: str) -> None:
        """Writes the state to a temporary name and renames it: a kill leaves the one before.

        Raises:
            ArtifactError: It cannot be written.
        """
        about = {"key": key, "step": str(self.step), "history": json.dumps(self.history)}
        write_tensors(path, self.tensors(), about, "the hypernetwork")

    def restore(self, path: Path, key: str) -> bool:
        """Goes back to what :meth:`save` wrote of the same training; ``False`` where there is no such file."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("key") != key:
                    return False
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
                step, history = int(about["step"]), json.loads(about["history"])
            self.network.load_state_dict(_below(tensors, "network/"))
            for index, parameter in enumerate(self._parameters()):
                moments = _below(tensors, f"adam/{index}/")
                if moments:
                    self.optimizer.state[parameter] = {
                        name: value if name == "step" else value.to(parameter.device) for name, value in moments.items()
                    }
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return False  # damaged, or none: begin again
        self.step, self.history = step, history
        return True


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def train_hypernetwork(
    model: Any,
    matrices: Sequence[EditMatrix],
    taught: Sequence[Lesson],
    settings: MetaSettings,
    *,
    path: Path | None = None,
    key: str = "",
    progress: Progress = no_progress,
) -> Meta:
    """Trains a hypernetwork.

    Args:
        model: The causal LM, frozen, with its original weights.
        matrices: What will be edited, inside :func:`crispedit.precision.float32_masters`.
        taught: Lessons, at least one.
        settings: How it is trained.
        path: A file for the state. If it holds that of the same training, that goes on from there, and ends with the
            same network bit for bit as one that was never interrupted (same machine, same number of threads).
        key: Says which training it is.
        progress: Called after every step.

    Returns:
        The training, finished.

    Raises:
        KeyboardInterrupt: As it came, after the state was saved.
    """
    meta = Meta(model, matrices, taught, settings)
    if path is not None and meta.restore(path, key):
        if meta.step < settings.steps:
            log.info("an interrupted training goes on after step %d of %d", meta.step, settings.steps)
    else:
        meta.fit_moments(progress)
    try:
        while meta.step < settings.steps:
            meta.advance()
            progress("training the hypernetwork", meta.step, settings.steps)
            if path is not None and (meta.step % SAVE_STEPS == 0 or meta.step == settings.steps):
                meta.save(path, key)
    except KeyboardInterrupt:
        if path is not None and meta.whole and 0 < meta.step < settings.steps:
            meta.save(path, key)
            log.info("interrupted after step %d of %d; the same command goes on from there", meta.step, settings.steps)
        raise
    return meta


def training_key(about: dict[str, Any]) -> str:
    """A hash of all that a training depends on."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def train_in_directory(
    directory: Path,
    model: Any,
    matrices: Sequence[EditMatrix],
    taught: Sequence[Lesson],
    settings: MetaSettings,
    about: dict[str, Any],
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Trains a hypernetwork and keeps it in a directory, or goes on with the same training there.

    Args:
        directory: New, empty, or of the same training.
        model: See :func:`train_hypernetwork`, like the next three.
        matrices: See there.
        taught: See there.
        settings: See there.
        about: All else that the training depends on, JSON-ready.
        overwrite: Whether what is in the directory may be replaced.
        progress: Called after every step.

    Returns:
        The record, as :data:`RECORD` holds it.

    Raises:
        ArtifactError: The directory holds something else.
    """
    about = {
        **about,
        "fingerprint": fingerprint(model),
        "matrices": [matrix.name for matrix in matrices],
        "layers": sorted({matrix.layer for matrix in matrices}),
        "settings": asdict(settings),
    }
    key = training_key(about)
    record = read_json(directory / RECORD) if (directory / RECORD).is_file() else None
    same = record is not None and record.get("key") == key
    if record is not None and same and record["finished"]:
        log.info("the hypernetwork in '%s' is trained already", directory)
        return dict(record)
    if record is not None and not same and not overwrite:
        raise ArtifactError(
            f"'{directory}' holds another training, of another model, other edits or other settings; name another "
            "directory or give --overwrite"
        )
    if record is None:
        check_writable(directory, overwrite=overwrite)
    record = {**about, "key": key, "finished": False}
    write_json(directory / RECORD, record)
    meta = train_hypernetwork(model, matrices, taught, settings, path=directory / TENSORS, key=key, progress=progress)
    record |= {"finished": True, "training": meta.report()}
    write_json(directory / RECORD, record)
    return record


def read_training(directory: Path) -> dict[str, Any]:
    """The record of a finished training.

    Args:
        directory: Written by ``crispedit train-mend``.

    Returns:
        The record.

    Raises:
        ArtifactError: There is none, or it is not finished.
    """
    if not (directory / RECORD).is_file():
        raise ArtifactError(f"'{directory}' has no {RECORD}: name a directory written by 'crispedit train-mend'")
    record = read_json(directory / RECORD)
    if not isinstance(record, dict) or not {"key", "finished", "layers", "settings"} <= record.keys():
        raise ArtifactError(f"'{directory / RECORD}' is not a record of 'crispedit train-mend'")
    if not record["finished"]:
        raise ArtifactError(f"the training in '{directory}' is not finished; the same 'crispedit train-mend' goes on")
    return record


def load_hypernetwork(directory: Path, model: Any, matrices: Sequence[EditMatrix]) -> Hypernetwork:
    """A trained hypernetwork for a model.

    Args:
        directory: Written by ``crispedit train-mend``.
        model: The causal LM with its original weights.
        matrices: What it is to edit.

    Returns:
        The network, on the matrices' device.

    Raises:
        ArtifactError: It was trained for another model or other matrices, or its file is damaged.
    """
    record = read_training(directory)
    if record["fingerprint"] != fingerprint(model):
        raise ArtifactError(
            f"the hypernetwork in '{directory}' was trained for {record.get('model', 'another model')}, with other "
            "weights than this model's; train one with 'crispedit train-mend'"
        )
    if record["matrices"] != [matrix.name for matrix in matrices]:
        layers = ",".join(map(str, record["layers"]))
        raise ArtifactError(f"the hypernetwork in '{directory}' edits other matrices; give --layers {layers} or none")
    settings = record["settings"]
    network = Hypernetwork([matrix.shape for matrix in matrices], settings["rank"], settings["step_size"], seed=0)
    try:
        with safe_open(directory / TENSORS, "pt") as file:
            if (file.metadata() or {}).get("key") != record["key"]:
                raise ArtifactError(f"'{directory / TENSORS}' is of another training than {RECORD} beside it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
        network.load_state_dict(_below(tensors, "network/"))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"cannot read the hypernetwork in '{directory}': {error}") from error
    return network.to(matrices[0].parameter.device)
