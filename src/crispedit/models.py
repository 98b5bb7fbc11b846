"""A Hugging Face causal LM by its structure: loading it, its decoder blocks, its down-projections.

Nothing here looks at a model's name. A decoder is the longest list of blocks that the configuration
counts; in every block the matrix that is edited is the MLP down-projection, the linear map from the
intermediate width back to the hidden width (CrispEdit, arXiv 2602.15823, section 4.2).

GPT-2's ``Conv1D`` stores Wᵀ. That is known here and nowhere else: :attr:`EditMatrix.weight` is always
(d_out, d_in).
"""

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from . import distributed, ranks
from .bundled import MODEL_DIRECTORY
from .errors import ConfigError, ModelError, did_you_mean
from .hardware import emulates_bfloat16
from .offload import State, check_place, name_devices, waiting
from .progress import log
from .shapes import SHAPES, shape_config

BUNDLED = "bundled"
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What transformers calls a model's cache, as an argument and in outputs; it was renamed in 5.24."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Part = Literal["down", "gate", "up", "query", "value"]
"""A matrix of a decoder block by what it does: the MLP's map back from the intermediate width, that into it through the
activation (the gate), that into it beside the gate; and attention's queries and values."""
_ATTENTION: dict[str, tuple[str, ...]] = {"query": ("q_proj", "query"), "value": ("v_proj", "value")}
_FUSED_ATTENTION = ("c_attn", "query_key_value", "qkv_proj")


@dataclass(frozen=True, kw_only=True)
class EditMatrix:
    """One matrix that may be edited: a parameter of the model seen as W of y = W a.

    Args:
        name: The parameter's name in ``model.state_dict()``.
        layer: Index of its decoder block.
        module: The linear module that owns it.
    """

    name: str
    layer: int
    module: nn.Module

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the model stores it."""
        parameter = self.module.weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def weight(self) -> Tensor:
        """A view of the parameter as W, (d_out, d_in): writing to it writes to the model."""
        return self.as_weight(self.parameter.data)

    def as_weight(self, stored: Tensor) -> Tensor:
        """A tensor in the parameter's layout (its gradient, say) seen as (d_out, d_in)."""
        return stored.T if isinstance(self.module, Conv1D) else stored

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.weight.shape
        return d_out, d_in


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its tokenizer and where it came from."""

    model: Any
    tokenizer: Any
    name: str
    stored_dtype: torch.dtype


def model_directory(name: str) -> str:
    """The path or hub name that ``name`` stands for (``bundled`` is the model in this package)."""
    return str(MODEL_DIRECTORY) if name == BUNDLED else name


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    offload: str | None = None,
    edited: Callable[[Any], Sequence[EditMatrix]] | None = None,
    shard: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads a causal LM and its tokenizer, weights from safetensors only.

    Args:
        name: ``bundled``, a local directory, or a Hugging Face name.
        device: ``auto`` (a GPU when there is one), ``cpu``, ``cuda``, ``cuda:1``, …
        dtype: ``auto`` (the checkpoint's; float16 becomes float32 on a CPU), or a name in ``DTYPES``.
        device_map: Passed to transformers (needs accelerate); then ``device`` is not used.
        offload: Where the decoder blocks below the first edited one wait until they are run: ``cpu`` or ``disk``
            (needs accelerate).
        edited: Of a model, the matrices that will be edited, in ascending order of layers: asked before weights are
            read, so that blocks which are not there are refused at once. With ``offload``, :func:`edit_matrices` when
            omitted.
        shard: Leave the weights in main memory, mapped from their files: :func:`crispedit.sharding.shard_model` is
            to bring its part to every device.
        trust_remote_code: Whether code shipped with the model may run.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: There is no such model, it is no causal LM with safetensors weights, some are
            missing, it is quantised, or it has no tokenizer.
        ConfigError: No such device or dtype; or a device map, or blocks that wait, for one of several processes; or
            a device map that leaves an edited block elsewhere than on a device.
    """
    source, target = _checked_source(name, dtype), find_device(device)
    check_place(offload, target)
    if (device_map or offload) is not None and ranks.joined():
        raise ConfigError("a device map spreads a model over the devices of one process; with several, leave it out")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _explained(name):
        config = _float_config(name, source, options)
        stored = _stored_dtype(config)
        wanted = _computing_dtype(stored, dtype, target if device_map is None else None)
        places: Any = device_map
        if edited is not None or offload is not None:
            skeleton = _skeleton(config, wanted, options)
            first = (edited or edit_matrices)(skeleton)[0].layer
        if offload is not None:
            places = waiting(skeleton, decoder_blocks(skeleton)[0], first, offload, target)
            if wanted != stored:  # what waits on disk is written there anew
                options["offload_folder"] = kept = tempfile.mkdtemp(prefix="crispedit-offload-")
                atexit.register(shutil.rmtree, kept, ignore_errors=True)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, use_safetensors=True, device_map=places, output_loading_info=True, **options
        )
        if missing := sorted(loading["missing_keys"]):  # transformers would go on with random numbers
            raise ModelError(f"'{name}' is not a whole {type(model).__name__}: it has no weights for {missing[0]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    for matrix in edited(model) if edited is not None and device_map is not None else ():
        if matrix.parameter.is_meta:
            raise ConfigError(
                f"the device map leaves block {matrix.layer}, which is to be edited, on the CPU or disk: edit other "
                "--layers, let blocks below them wait (--offload), or divide the model (--shard)"
            )
    if offload is not None:
        name_devices(model)
    if places is None and not shard:
        model.to(target)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, name=name, stored_dtype=stored)


def load_skeleton(
    name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False, tokenizer: bool = True
) -> LoadedModel:
    """What :func:`load_model` would load, without a weight: the model on the ``meta`` device, and the tokenizer.

    Args:
        name: As in :func:`load_model`, like the next three; of a model on the Hub, only small files are fetched. Or,
            where there is no such directory, one of :data:`crispedit.shapes.SHAPES`.
        device: Where the weights would go.
        dtype: See there.
        trust_remote_code: See there.
        tokenizer: Whether it is needed; without, a directory with a configuration will do, and the tokenizer is
            ``None``.

    Returns:
        The model in evaluation mode; its parameters have shapes and the dtype that it would compute in.

    Raises:
        ModelError: There is no such model, it is no causal LM, it is quantised, or it has no tokenizer.
        ConfigError: No such device or dtype.
    """
    source, target = _checked_source(name, dtype), find_device(device)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    shape = None if Path(source).exists() else shape_config(name)
    if tokenizer and (shape is not None or _lacks_tokenizer(Path(source))):
        raise ModelError(f"'{name}' has no tokenizer, in whose tokens edits are counted: leave EDITS out")
    with _explained(name, (BUNDLED, *SHAPES)):
        config = _float_config(name, source, options) if shape is None else shape
        stored = _stored_dtype(config)
        model = _skeleton(config, _computing_dtype(stored, dtype, target), options)
        read = transformers.AutoTokenizer.from_pretrained(source, **options) if tokenizer else None
    return LoadedModel(model=model.eval(), tokenizer=read, name=name, stored_dtype=stored)


def _skeleton(config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """A model of a configuration without a weight."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def _lacks_tokenizer(directory: Path) -> bool:
    """Whether a directory has none of a tokenizer's files, where transformers would make an empty one."""
    patterns = ("*token*", "vocab*", "*.model")
    return directory.is_dir() and not any(found for pattern in patterns for found in directory.glob(pattern))


def _checked_source(name: str, dtype: str) -> str:
    """The path or hub name of a model, where that can be one and the dtype too."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype is '{dtype}'; it must be auto, {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    source = model_directory(name)
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ModelError(f"'{name}' is not a model directory: it has no config.json")
    if not Path(source).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no name on the Hub
        raise ModelError(f"there is no directory '{name}'; name one with a model in it, OWNER/NAME, or {BUNDLED}")
    return source


@contextmanager
def _explained(name: str, known: Sequence[str] = (BUNDLED,)) -> Iterator[None]:
    """Within, what transformers raises becomes one line about the model; ``known`` are names that may be meant."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and "couldn't connect to" in str(error) and not Path(name).exists():
            raise ModelError(
                f"cannot load the model '{name}': there is no such directory, and huggingface.co, which may have it, "
                f"does not answer{did_you_mean(name, known)}"
            ) from error
        raise ModelError(f"cannot load the model '{name}': {_first_line(error)}") from error


def _float_config(name: str, source: str, options: dict[str, Any]) -> Any:
    """The configuration of a model that is not quantised."""
    config = transformers.AutoConfig.from_pretrained(source, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"'{name}' is quantised; crispedit edits float checkpoints: name the model it was made from")
    return config


def _computing_dtype(stored: torch.dtype, dtype: str, target: torch.device | None) -> torch.dtype:
    """What a model computes in: what was asked for, or what is stored; no float16 on a CPU."""
    wanted = stored if dtype == "auto" else DTYPES[dtype]
    on_cpu = target is not None and target.type == "cpu"
    if on_cpu and dtype == "auto" and wanted == torch.bfloat16 and emulates_bfloat16():
        _say_that_float32_is_faster()
    return torch.float32 if wanted == torch.float16 and on_cpu else wanted


@cache
def _say_that_float32_is_faster() -> None:
    """Once, however many models are loaded."""
    log.info(
        "the model is stored in bfloat16, which this CPU multiplies many times slower than float32: "
        "--dtype float32 is faster, and takes twice the memory"
    )


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] + "…" * (len(text) > 300)


def find_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU when there is one: of several processes on a host, each has its own.

    Raises:
        ConfigError: It cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.local_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(
                f"device '{name}' is one GPU for {ranks.local_size()} processes; each has its own: leave it out"
            )
        name = f"cuda:{ranks.local_rank()}"
    try:
        device = torch.device(name)
        if device.type == "mps":
            raise ConfigError("device 'mps' has no float64, which crispedit computes sums in: give --device cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # of a word that is no device torch names twenty kinds
        why = (
            f": {_first_line(error)}" if name.startswith(("cuda", "cpu")) else "; it must be auto, cpu, cuda or cuda:1"
        )
        raise ConfigError(f"device '{name}' cannot be used here{why}") from error
    return device


def _stored_dtype(config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def text_config(model: Any) -> Any:
    """The configuration of the text decoder (a multimodal model has others beside it)."""
    return model.config.get_text_config(decoder=True)


def intermediate_width(model: Any) -> int:
    """The width inside an MLP, which down-projections take as their input."""
    config = text_config(model)
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    if isinstance(width, list | tuple):  # one for every block
        width = max(width)
    return int(width or 4 * config.hidden_size)


def context_length(model: Any) -> int | None:
    """The longest row in tokens that the model takes, or ``None`` where it does not say."""
    length = getattr(text_config(model), "max_position_embeddings", None)
    return int(length) if length else None


def decoder_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name in the module tree.

    Args:
        model: A causal LM.

    Returns:
        Name and list; its length is the L that layer numbers count.

    Raises:
        ModelError: No list of modules is as long as the configuration says the decoder is.
    """
    expected = getattr(text_config(model), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [
        (name, blocks) for name, blocks in lists if len(blocks) == expected and len({type(b) for b in blocks}) == 1
    ]
    if not fitting:
        raise ModelError(f"{type(model).__name__} has no list of {expected} decoder blocks that crispedit can find")
    if len(fitting) == 1:
        return fitting[0]
    # by size: an embedder or an adapter may happen to have as many parts
    return max(fitting, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def edit_matrices(
    model: Any, layers: Sequence[int] | None = None, parts: Sequence[Part] = ("down",)
) -> tuple[EditMatrix, ...]:
    """Matrices of the given decoder blocks, by default their MLP down-projections.

    Args:
        model: A causal LM.
        layers: Indices of decoder blocks; :func:`default_layers` when omitted.
        parts: Which matrices of a block.

    Returns:
        In ascending order of layers, and within a layer in the order of ``parts``; each matrix once, though it may be
        several parts (where a family keeps queries, keys and values in one).

    Raises:
        ModelError: A block has no such matrix that can be told apart, has experts, or has
            quantised weights; or the matrix is shared with another module.
        ConfigError: A layer is outside the model, or none is given.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"this {type(model).__name__} is quantised; crispedit edits float checkpoints")
    prefix, blocks = decoder_blocks(model)
    chosen = default_layers(len(blocks)) if layers is None else tuple(sorted(set(layers)))
    if not chosen:
        raise ConfigError("no layer is given; name at least one")
    if wrong := [layer for layer in chosen if not 0 <= layer < len(blocks)]:
        raise ConfigError(f"layer {wrong[0]} is outside the model: it has layers 0 to {len(blocks) - 1}")
    names = {id(module): name for name, module in model.named_modules()}
    matrices = []
    for layer in chosen:
        found = (_part(model, blocks[layer], part, f"{prefix}.{layer}") for part in parts)
        for module in dict.fromkeys(found):
            matrices.append(EditMatrix(name=f"{names[id(module)]}.weight", layer=layer, module=module))
    _refuse_shared(model, matrices)
    return tuple(matrices)


def _part(model: Any, block: nn.Module, part: Part, where: str) -> nn.Module:
    """The linear map of a block that is this part of it."""
    down = _down_projection(model, block, where)
    if part == "down":
        return down
    linears = [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not down]
    hidden, intermediate = text_config(model).hidden_size, intermediate_width(model)
    if part in ("gate", "up"):
        # a family may keep both in one matrix, or have no gate: then its one map is both
        into = [(name, m) for name, m in linears if _shape(m) in ((intermediate, hidden), (2 * intermediate, hidden))]
        named = [m for name, m in into if ("gate" in name.rpartition(".")[2]) == (part == "gate")]
        found = named or [m for _, m in into]
    else:
        wanted = (*_ATTENTION[part], *_FUSED_ATTENTION)
        found = [m for name, m in linears if name.rpartition(".")[2] in wanted and _shape(m)[1] == hidden]
    if not found:
        raise ModelError(f"{where} has no {part} projection that crispedit can find")
    return found[-1] if part == "up" else found[0]


def _down_projection(model: Any, block: nn.Module, where: str) -> nn.Module:
    """The linear map from the intermediate to the hidden width: the last such map of the block."""
    config = text_config(model)
    hidden, intermediate = config.hidden_size, intermediate_width(model)
    experts = [name for name, p in block.named_parameters() if p.ndim > 2]
    experts += [name for name, m in block.named_modules() if isinstance(m, nn.ModuleList) and _has_linear(m)]
    if experts:
        raise ModelError(f"{where} has a mixture of experts ({experts[0]}); crispedit edits dense models only")
    if quantised := [name for name, p in block.named_parameters() if p.itemsize == 1 or not p.is_floating_point()]:
        raise ModelError(f"{where} has quantised weights ({quantised[0]}); crispedit edits float checkpoints")
    linears = [m for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
    found = [m for m in linears if _shape(m) == (hidden, intermediate)]
    if not found:
        raise ModelError(f"{where} has no MLP down-projection: no linear map from {intermediate} to {hidden} numbers")
    # an attention output may have the same shape; in every family the MLP is defined after the attention
    return found[-1]


def mlp_of(model: Any, block: nn.Module) -> nn.Module:
    """The child of a decoder block that its down-projection is in: the MLP.

    Args:
        model: The causal LM.
        block: One of its decoder blocks.

    Returns:
        The module; the down-projection itself where the block has no module for its MLP.

    Raises:
        ModelError: The block has no down-projection that can be told apart.
    """
    down = _down_projection(model, block, "a block")
    return next(child for child in block.children() if any(module is down for module in child.modules()))


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear | Conv1D) for m in module.modules())


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _refuse_shared(model: Any, matrices: Sequence[EditMatrix]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    for matrix in matrices:
        shared = [name for name in owners[id(matrix.parameter)] if name != matrix.name]
        if shared:
            raise ModelError(f"{matrix.name} is shared with {shared[0]}; editing one would change the other")


def default_layers(num_layers: int) -> tuple[int, ...]:
    """The blocks that are edited unless the user names others: five, the last at three quarters of the depth.

    It gives the paper's 19–23 for 32 blocks, and 1–5 for the bundled model's 8 (``docs/decisions.md``).

    Args:
        num_layers: L, the number of decoder blocks.

    Returns:
        Ascending indices, never empty.
    """
    last = max(0, -(-3 * num_layers // 4) - 1)
    return tuple(range(max(0, last - 4), last + 1))


def parse_layers(text: str) -> tuple[int, ...]:
    """``19-23`` or ``4,5,6`` or ``2,4-6`` as indices; ranges are inclusive.

    Args:
        text: What the user wrote.

    Returns:
        Ascending indices without repetition.

    Raises:
        ConfigError: It is not a list of numbers and ranges.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first + last) > 10:
            raise ConfigError(f"layers is '{text}'; it must look like 19-23 or 4,5,6")
        if dash and int(last) < int(first):
            raise ConfigError(f"layers is '{text}'; the range {part.strip()} runs backwards")
        layers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


def fingerprint(model: Any) -> str:
    """A hash of the weights: of the fingerprints of all tensors.

    It costs milliseconds per gigabyte, and two checkpoints of one architecture differ in it.
    """
    return hashlib.sha256(json.dumps(sorted(tensor_fingerprints(State(model)).items())).encode()).hexdigest()


def tensor_fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hashes of shape and about a thousand evenly spaced values of every tensor, whatever dtype holds them.

    Args:
        tensors: By name.

    Returns:
        Sixteen hexadecimal digits each, by name.
    """
    found = {}
    for name, tensor in tensors.items():
        values = distributed.every_nth(tensor.detach(), max(1, tensor.numel() // 1024))
        digest = hashlib.sha256(f"{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
        found[name] = digest.hexdigest()[:16]
    return found


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of how a tokenizer turns text into tokens: its whole pipeline where it is a fast one, else its vocabulary.

    What calls leave behind in it (truncation, padding) does not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any
    if backend is not None:
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    else:
        vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
        content = [type(tokenizer).__name__, sorted(vocabulary.items())]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def chat_template_hash(tokenizer: Any) -> str | None:
    """A hash of a tokenizer's chat template, or ``None`` where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None


@contextmanager
def frozen(model: Any) -> Iterator[Any]:
    """Nothing requires a gradient and dropout is off within; both are as before afterwards."""
    needed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    training = model.training
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for name, parameter in model.named_parameters():  # by name: a matrix may have got a new parameter
            parameter.requires_grad_(name in needed)
        model.train(training)
