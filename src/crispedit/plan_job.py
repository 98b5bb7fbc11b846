"""What ``crispedit plan`` does: the edit that the command line names, or a typical one, put into numbers."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .assumed import Method
from .curvature import check_matrices
from .curvature_file import read_manifest
from .editors import configured
from .editors.crispedit import Config
from .edits import EditSet, spread
from .errors import ConfigError, ModelError
from .factors import check_kind
from .generation import BATCH_TOKENS
from .halves import token_halves
from .inputs import capability_texts, read_edits
from .memory import free_memory, resident_bytes
from .methods import compare_methods, parse_devices
from .models import (
    EditMatrix,
    LoadedModel,
    context_length,
    decoder_blocks,
    edit_matrices,
    find_device,
    load_skeleton,
    parse_layers,
)
from .moments import Kind
from .offload import check_place
from .planning import Plan, fit_memory, kind_that_fits, parse_memory, plan_edit
from .precision import mixed_precision
from .processes import Processes
from .proof import PROOF_EDITS
from .rows import Prompter
from .speed import Speed, measure_speed
from .texts import TokenBatch, text_batches, token_groups
from .typical import EDITS, ROW, TEXT, TEXTS, typical_prompts, typical_rows, typical_texts
from .wild import questions
from .workload import Settings, Workload


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """One ``crispedit plan``: what the command line says. No weight is loaded."""

    model: str
    edits: str | None = None
    curvature: Path | None = None
    texts: Path | None = None
    samples: int | None = None
    layers: str | None = None
    factors: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    memory: str | None = None
    devices: str | None = None
    processes: int = 1
    shard: bool = False
    offload: str | None = None
    eos: bool = True
    chat: str = "auto"
    conflicts: str = "error"

    def run(self, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Plan:
        """Plans the edit that ``crispedit edit`` would make of the same arguments.

        Args:
            device: As in :func:`crispedit.models.load_skeleton`, like the next two.
            dtype: See there.
            trust_remote_code: See there.

        Returns:
            The plan, with a fit to ``memory``, or else to what is free; with other methods where devices are named.

        Raises:
            ConfigError: Something does not go together.
            ModelError: There is no such model, or it has no tokenizer and edits are given.
        """
        config = configured("crispedit", dict(self.settings))[1]
        assert isinstance(config, Config)
        check_place(self.offload)
        method, processes = _method(config), Processes(self.processes, self.shard, self.offload is not None)
        given = parse_memory(self.memory) if self.memory is not None else None
        devices = parse_devices(self.devices) if self.devices is not None else {}
        self._check()
        layers = parse_layers(self.layers) if self.layers is not None else None
        edit_set = read_edits(self.edits, limit=self.limit, conflicts=self.conflicts) if self.edits else None
        manifest = read_manifest(self.curvature) if self.curvature is not None else None
        if layers is None and manifest is not None:
            layers = tuple(manifest["layers"])
        named = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        loaded = load_skeleton(self.model, tokenizer=self.edits is not None, **named)  # type: ignore[arg-type]
        matrices = edit_matrices(loaded.model, layers)
        if manifest is not None:
            _check_planned(manifest, matrices)
        target = find_device(device)
        if edit_set is None:
            work, notes = self._typical(loaded, config.epochs)
        else:
            work, notes = self._workload(loaded, edit_set, manifest, config.epochs)
        of_process = _gpu(loaded) if devices else _process(loaded, target)
        work = replace(work, energy=config.energy, processes=processes, **of_process)
        memory = given or max(devices.values(), default=0) or _free(work, target)
        settings = Settings(
            layers=tuple(matrix.layer for matrix in matrices),
            dtype=loaded.model.dtype,
            batch_size=config.batch_size,
            mapped=False,
            kind=self._kind(work, matrices, manifest, memory),
            method=method,
        )
        speed = None if edit_set is None or devices else _speed(loaded.model, target, matrices, notes)
        plan = plan_edit(work, settings, memory, speed)
        return replace(
            plan,
            notes=[*notes, *_notes(processes, plan), *plan.notes],
            fit=fit_memory(work, settings, memory),
            compared=compare_methods(work, settings, devices) if devices else (),
        )

    def _check(self) -> None:
        """Refuses what does not go together."""
        check_kind(self.factors)
        if self.edits is None and (self.texts is not None or self.curvature is not None):
            raise ConfigError("without EDITS their lengths are assumed, and those of texts: leave out what is of texts")
        if self.curvature is not None and self.factors != "auto":
            raise ConfigError("--factors is of a curvature that is yet to be computed: leave it or --curvature out")
        for name, count, least in (("limit", self.limit, 1), ("samples", self.samples, 2)):  # one is held out
            if self.edits is None and count is not None and count < least:
                raise ConfigError(f"--{name} is {count}; it must be {least} or more")

    def _kind(
        self, work: Workload, matrices: Sequence[EditMatrix], manifest: Mapping[str, Any] | None, memory: int
    ) -> Kind:
        """Of the factors: those that there are, those that are asked for, or those that fit."""
        if manifest is not None:
            known: Kind = manifest["factors"]
            return known
        if self.factors != "auto":
            return self.factors  # type: ignore[return-value]  # checked
        return kind_that_fits(work, [matrix.layer for matrix in matrices], work.model.dtype, memory)

    def _typical(self, loaded: LoadedModel, epochs: int) -> tuple[Workload, list[str]]:
        """So many edits and texts of typical lengths, and what is to be said of them."""
        edits = EDITS if self.limit is None else self.limit
        samples = TEXTS if self.samples is None else self.samples
        halves, held_out = typical_texts(loaded.model, samples)
        rows, prompts = typical_rows(edits), typical_prompts(edits)
        work = Workload(
            model=loaded.model,
            rows=rows,
            prompts=[[len(ids) for ids in group] for group in token_groups(prompts, BATCH_TOKENS)],
            proof_rows=spread(rows, PROOF_EDITS),
            halves=[_lengths(half) for half in halves],
            held_out=_lengths(held_out),
            known=False,
            stored_dtype=loaded.stored_dtype,
            epochs=epochs,
        )
        return work, [f"no edits are given: {edits:,} of {ROW} tokens and {samples:,} texts of {TEXT} are assumed"]

    def _workload(
        self,
        loaded: LoadedModel,
        edit_set: EditSet,
        manifest: dict[str, Any] | None,
        epochs: int,
    ) -> tuple[Workload, list[str]]:
        """The lengths of all that the edit would put through the model, and what is to be said of it."""
        model, tokenizer = loaded.model, loaded.tokenizer
        texts = capability_texts(self.model, self.texts, self.samples, 0) if manifest is None else None
        notes = list(edit_set.notes)
        if texts is None and manifest is None:
            notes.append("no texts are given: a curvature in the cache is assumed, and drift is left out")
        prompter = Prompter.of(model, tokenizer, chat=self.chat, eos=self.eos)  # type: ignore[arg-type]
        rows = prompter.rows(edit_set, context_length(model))
        asked = {prompter.prompt(question.prompt) for question in questions(spread(tuple(edit_set), PROOF_EDITS))}
        groups = token_groups(sorted(asked, key=len), BATCH_TOKENS)
        held_out = texts.held_out if texts is not None else (manifest or {}).get("held_out", ())
        work = Workload(
            model=model,
            rows=rows,
            prompts=[[len(ids) for ids in group] for group in groups],
            proof_rows=spread(rows, PROOF_EDITS),
            halves=[_lengths(half) for half in token_halves(model, tokenizer, texts.fit)] if texts is not None else [],
            held_out=_lengths(text_batches(model, tokenizer, held_out)) if held_out else [],
            known=texts is None,
            stored_dtype=loaded.stored_dtype,
            epochs=epochs,
            ranks={
                name: (about["effective_rank"][0], about["effective_rank"][1])
                for name, about in (manifest or {}).get("matrices", {}).items()
            },
        )
        return work, notes


def _method(config: Config) -> Method:
    """What is counted of an editor's settings."""
    if config.energy == 0:
        raise ConfigError("energy 0 is plain fine-tuning, which has no curvature: plan counts energies above 0")
    if config.constraint not in ("auto", "staircase", "cross"):
        raise ConfigError(f"plan counts constraint auto, staircase and cross, and not '{config.constraint}'")
    if config.frontier > 1:
        raise ConfigError(
            "plan counts an edit within one budget: leave frontier out; it takes that time for every budget, and that "
            "of plain fine-tuning"
        )
    return Method(
        constraint=config.constraint,
        update=config.update,
        rotation=config.rotation,
        budget=config.budget is not None,
    )


def _process(loaded: LoadedModel, device: torch.device) -> dict[str, Any]:
    """What is true of a process on a device: fields of :class:`Workload`."""
    on_cpu = device.type == "cpu"
    return {
        "on_cpu": on_cpu,
        "mixed": mixed_precision("auto", loaded.model.dtype, device),
        "base_bytes": resident_bytes() if on_cpu else 0,
        "base_seconds": time.process_time(),
    }


def _free(work: Workload, device: torch.device) -> int:
    """What one of the processes finds on a device here: what the plan itself takes would be the edit's."""
    return free_memory(device) // work.processes.size + work.base_bytes


def _gpu(loaded: LoadedModel) -> dict[str, Any]:
    """The same of a GPU that is not here: it has memory of its own, and multiplies bfloat16 matrices faster."""
    return {"on_cpu": False, "mixed": loaded.model.dtype != torch.float16, "base_bytes": 0, "base_seconds": 0.0}


def _speed(model: Any, device: torch.device, matrices: Sequence[EditMatrix], notes: list[str]) -> Speed | None:
    """How fast this machine is, where it can run a block of the model; else a note why there are no times."""
    layer = matrices[-1].layer
    block = sum(p.numel() * p.element_size() for p in decoder_blocks(model)[1][layer].parameters())
    if block > free_memory(device) / 2:
        notes.append("no times: there is no room here to run a block of this model")
        return None
    sizes = [size for matrix in matrices for size in matrix.shape]
    try:
        return measure_speed(model, device=device, layer=layer, sizes=sizes)
    except Exception as error:  # a block of foreign code may need more than a block is given
        notes.append(f"no times: a block of this model cannot be run alone ({type(error).__name__}: {error})")
        return None


def _notes(processes: Processes, plan: Plan) -> list[str]:
    """What is to be said of several processes, or of blocks that wait."""
    if processes.offload:
        return ["blocks below the first edited one wait elsewhere; times leave out what is brought from there"]
    if processes.size == 1:
        return []
    notes = [f"numbers are those of one of {processes.size} processes; times leave out how long what moves takes"]
    if processes.shard and plan.settings.save == "model":
        notes.append("saving puts the whole model together in the main memory of rank 0")
    return notes


def _lengths(batches: Sequence[TokenBatch]) -> list[list[int]]:
    """Lengths of the rows of batches."""
    return [batch.mask.sum(1).tolist() for batch in batches]


def _check_planned(manifest: dict[str, Any], matrices: Sequence[EditMatrix]) -> None:
    """Refuses a curvature of other matrices; that its weights are these is checked when there are weights."""
    check_matrices(manifest["matrices"], manifest["layers"], matrices)
    for matrix in matrices:
        shape = manifest["matrices"][matrix.name]
        if (shape["d_out"], shape["d_in"]) != matrix.shape:
            raise ModelError(
                f"the curvature was computed for '{manifest['model']}', whose {matrix.name} is "
                f"{shape['d_out']} × {shape['d_in']}, not {matrix.shape[0]} × {matrix.shape[1]}; "
                "compute it for this model"
            )
