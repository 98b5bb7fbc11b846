"""Edited models on disk: an ordinary Hugging Face directory, or only the patch that makes it of its base.

Both forms hold ``crispedit.json``, from which the run can be repeated; that of a model that patches were put on says
which. Tensors are safetensors; nothing is unpickled.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from .artifacts import check_space, read_json, write_json
from .errors import ArtifactError, EditFailed, ModelError, check_choice
from .models import DTYPES, EditMatrix, LoadedModel, load_model, model_directory
from .offload import State
from .patch import Patch, apply_to

RECORD, PATCH = "crispedit.json", "patch.safetensors"
Form = Literal["model", "delta"]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What storing a change in the checkpoint's dtype does to it.

    Args:
        dtype: The stored dtype.
        survived: Share of the entries that were to change and do differ once stored, 0 to 1.
        relative_error: ‖stored change − change‖ / ‖change‖ over all matrices.
    """

    dtype: str
    survived: float
    relative_error: float


def round_to(matrices: Sequence[EditMatrix], originals: Mapping[str, Tensor], dtype: torch.dtype) -> Rounding:
    """Rounds edited matrices, in place, to what will be stored, and measures what that does to the change.

    Args:
        matrices: Edited, in float32.
        originals: W₀ by name, (d_out, d_in).
        dtype: The dtype of the checkpoint.

    Returns:
        The measurement.
    """
    meant, kept, wrong, norm = 0, 0, 0.0, 0.0
    for matrix in matrices:
        original = originals[matrix.name].float()
        delta = matrix.weight - original
        matrix.weight.copy_(matrix.weight.to(dtype))
        change = matrix.weight - original.to(dtype).float()
        meant += int((delta != 0).sum())
        kept += int(((delta != 0) & (change != 0)).sum())
        wrong += float((change - delta).double().square().sum())
        norm += float(delta.double().square().sum())
    survived = kept / meant if meant else 1.0
    relative_error = (wrong / norm) ** 0.5 if norm else 0.0
    return Rounding(dtype=str(dtype).removeprefix("torch."), survived=survived, relative_error=relative_error)


def write_model(
    model: Any, tokenizer: Any, directory: Path, dtype: torch.dtype, state: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a Hugging Face model into an existing directory.

    Args:
        model: The edited model; weights of the dtype it computes in are stored in ``dtype``.
        tokenizer: Saved beside it, with its chat template.
        directory: Where its files go.
        dtype: The checkpoint's dtype.
        state: The model's tensors, where they are not in the model itself.

    Raises:
        ArtifactError: There is too little room.
    """
    architectures = model.config.architectures
    check_space(directory, sum(p.numel() for p in model.parameters()) * dtype.itemsize)
    cast: dict[Any, Tensor] = {}  # by address: tied tensors stay tied, and are stored once
    waits = {name for name, t in model.state_dict().items() if t.is_meta} if state is None else set()
    state = {
        # what is read from elsewhere is not tied, and where it was others may come to lie
        name: cast.setdefault(
            name if name in waits else (t.data_ptr(), t.shape), t.to(dtype) if t.dtype == model.dtype else t
        )
        for name, t in (State(model) if state is None else state).items()
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Attempting to save a model with offloaded modules"
            )  # they are in the state
            model.save_pretrained(directory, state_dict=state)
        tokenizer.save_pretrained(directory)
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        raise ArtifactError(f"cannot write the model: {error}") from error
    config = read_json(directory / "config.json")
    if state is not None:  # a sharded model's class has another name
        model.config.architectures = config["architectures"] = architectures
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", config)


def check_files(model: Any, directory: Path, dtype: torch.dtype, state: Mapping[str, Tensor] | None = None) -> None:
    """Compares the files of a written model, tensor by tensor, with what was to be written, bit for bit.

    Args:
        model: The model that was written.
        directory: Where :func:`write_model` wrote it.
        dtype: In which dtype.
        state: The model's tensors, where they are not in the model itself.

    Raises:
        EditFailed: A tensor is missing, or another one.
    """
    state = State(model) if state is None else state
    written: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if any(name not in state for name in names):  # transformers stores some otherwise than it holds them
                _read_compared(model, directory, dtype, state)
                return
            for name in names:
                tensor = state[name]
                wanted = tensor.to(dtype) if tensor.dtype == model.dtype else tensor
                if not torch.equal(file.get_tensor(name), wanted.cpu()):
                    raise EditFailed(f"{name} of the saved model is not what was to be saved; nothing was kept")
                written.add(name)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})  # stored once
    there = written | {name for pair in tied.items() if written & set(pair) for name in pair}
    if missing := [name for name in state if name not in there]:
        raise EditFailed(f"the saved model has no {missing[0]}; nothing was kept")


def read_back(model: Any, directory: Path, dtype: torch.dtype) -> Any:
    """Reads a written model as any program would, and compares every tensor with what was to be written, bit for bit.

    It is read into CPU memory; there is one copy of the weights on a GPU, and it serves both models.

    Args:
        model: The model that was written; it must not be changed while the one returned is in use.
        directory: Where :func:`write_model` wrote it.
        dtype: In which dtype.

    Returns:
        The model that was read, on the device and in the dtype of ``model``.

    Raises:
        EditFailed: A tensor is missing, or another one.
    """
    return _read_compared(model, directory, dtype, State(model)).to(model.device).eval()


def _read_compared(model: Any, directory: Path, dtype: torch.dtype, state: Mapping[str, Tensor]) -> Any:
    """The model of a directory, in CPU memory, compared with a state; what is the same shares the state's memory."""
    attention = model.config._attn_implementation
    read = AutoModelForCausalLM.from_pretrained(
        directory, dtype=model.dtype, use_safetensors=True, attn_implementation=attention
    )
    found, parameters, wrong = read.state_dict(), dict(read.named_parameters()), []
    for name, tensor in state.items():
        wanted = tensor.to(dtype).to(tensor.dtype) if tensor.dtype == model.dtype else tensor
        if name not in found or not torch.equal(found[name], wanted.to("cpu", found[name].dtype)):
            wrong.append(name)
        elif name in parameters:
            parameters[name].data = wanted.to(found[name].dtype)
    wrong += found.keys() - state.keys()
    if wrong:
        raise EditFailed(
            f"{len(wrong)} tensors of the saved model are not those that were to be saved, e.g. {wrong[0]}; "
            "nothing was kept"
        )
    return read


def check_room(model_name: str, directory: Path) -> None:
    """Refuses an output directory without room for a model as large as a local one, before any work is done.

    Args:
        model_name: The base model; one that is not a local directory is checked when it is saved.
        directory: Where the edited model is to go.
    """
    source = Path(model_directory(model_name))
    check_space(directory, sum(file.stat().st_size for file in source.glob("*.safetensors")) if source.is_dir() else 0)


def read_record(directory: str | Path) -> dict[str, Any] | None:
    """The ``crispedit.json`` of a directory, or ``None`` where there is none."""
    path = Path(directory) / RECORD
    return dict(read_json(path)) if path.is_file() else None


def load_edited(name: str, **options: Any) -> LoadedModel:
    """Loads a model as :func:`crispedit.models.load_model` does; a saved patch is put onto its base.

    Args:
        name: A model, or a directory written with ``--save delta``.
        **options: For :func:`~crispedit.models.load_model`.

    Returns:
        The model.

    Raises:
        ArtifactError: The patch is damaged, or does not name its base.
        ModelError: The base is not the one that was edited.
    """
    directory = Path(name)
    if not (directory / PATCH).is_file():
        return load_model(name, **options)
    patch = Patch.read(directory / PATCH)
    if not patch.about.get("model"):
        raise ArtifactError(f"'{name}' does not name the model it changes; edit with model_name=… to record it")
    # as it was when it was edited: in another dtype weights may have been rounded; what is asked for comes afterwards
    wanted, options["dtype"] = options.get("dtype", "auto"), patch.about["dtype"]
    check_choice("dtype", wanted, ("auto", *DTYPES))
    loaded = load_model(patch.about["model"], **options)
    try:
        apply_to(loaded.model, patch, loaded.stored_dtype)
    except ModelError as error:
        raise ModelError(f"'{name}' changes '{patch.about['model']}', which is not as it was: {error}") from None
    if wanted != "auto":
        loaded.model.to(DTYPES[wanted])
    return LoadedModel(model=loaded.model, tokenizer=loaded.tokenizer, name=name, stored_dtype=loaded.stored_dtype)
