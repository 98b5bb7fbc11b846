"""How fast a machine is at what an edit does, measured in about two seconds.

One decoder block of the model at hand, with its shapes and in its dtype but without its weights, is run forward and
backward, over few tokens and over many: a small batch is bound by overhead, a large one by products, or by memory. Then
the head, products, a diagonalisation, a step of Adam and a copy of memory.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .fisher import sampled
from .models import CACHE, decoder_blocks, text_config
from .pieces import tokens_at_once

BUDGET = 0.25
"""Seconds that a measurement may take, or one run of what is measured if that takes longer."""
ROW, FEW, MANY = 32, 32, 2048
"""Tokens of a row, of a small batch, and of a large one at most."""
NUMBERS, HEAD = 2**22, 2**27
"""Numbers of a tensor that is made to measure something; of the head's matrix, at most: no cache holds it."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a device does in a second.

    Args:
        blocks: Tokens, seconds of a decoder block forward, and seconds of the gradient in its input; ascending.
        cached: Rows, and seconds of a block forward over one more token of each, keys and values of :data:`ROW` tokens
            being kept; ascending.
        row: Tokens per row of these.
        head: Positions, and flops per second of the product of so many with the head's matrix; ascending.
        float32: Flops per second of float32 products.
        float64: Of float64 products.
        eigh: Seconds of a float64 diagonalisation, divided by n³.
        logit: Seconds per logit of drawing a label, of the loss of one and of its gradient.
        adam: Seconds of a step of Adam per number.
        copied: Bytes of memory that are copied per second, read and written counted once.
    """

    blocks: tuple[tuple[int, float, float], ...]
    cached: tuple[tuple[int, float], ...]
    row: int
    head: tuple[tuple[int, float], ...]
    float32: float
    float64: float
    eigh: float
    logit: float
    adam: float
    copied: float

    def forward(self, tokens: float) -> float:
        """Seconds of a block forward over a batch of so many tokens."""
        return _between([(tokens, forward) for tokens, forward, _ in self.blocks], tokens)

    def backward(self, tokens: float) -> float:
        """Seconds of the gradient in a block's input over a batch of so many tokens."""
        return _between([(tokens, backward) for tokens, _, backward in self.blocks], tokens)

    def logits(self, flops: float, positions: int) -> float:
        """Seconds of products with the head's matrix, so many positions at a time: of few, memory is the bound."""
        rates = [rate for measured, rate in self.head if measured <= positions]
        return flops / (rates[-1] if rates else self.head[0][1])

    def answer(self, rows: float) -> float:
        """Seconds of a block forward over the next token of so many rows, all that came before being kept."""
        return _between(self.cached, rows)


def _between(points: Sequence[tuple[int, float]], count: float) -> float:
    """On the straight lines through what was measured; no less than the fewest took."""
    if count >= points[-1][0]:
        return points[-1][1] * count / points[-1][0]
    right = next(number for number, (measured, _) in enumerate(points) if measured > count)
    if right == 0:
        return points[0][1]
    (x, y), (more, longer) = points[right - 1], points[right]
    return y + (longer - y) * (count - x) / (more - x)


def measure_speed(model: Any, *, device: torch.device, layer: int, sizes: Sequence[int]) -> Speed:
    """Measures a device with one block of a model.

    Args:
        model: A causal LM on the ``meta`` device; the dtype of its parameters is measured.
        device: What is measured.
        layer: Index of the decoder block that stands for all.
        sizes: Of the factors that will be diagonalised: small ones are measured as they are.

    Returns:
        The speeds.
    """
    body, width = _one_block(model, layer, device), int(text_config(model).hidden_size)
    tokens = FEW
    blocks: list[tuple[int, float, float]] = []
    while not blocks or (tokens <= MANY and sum(blocks[-1][1:]) < BUDGET / 2):
        inputs = torch.randn(tokens // ROW, ROW, width, device=device, dtype=model.dtype).requires_grad_()
        blocks.append((tokens, *_forward_backward(body, inputs, device)))
        tokens *= 4
    cached = tuple((rows, _cached(body, rows, width, device, model.dtype)) for rows in (FEW, 8 * FEW))
    del body
    size = min(512, max(sizes))
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    columns = max(1, min(vocabulary, HEAD // width))
    at_once = sorted({min(tokens_at_once(vocabulary, device.type), 256), 256})
    return Speed(
        blocks=tuple(blocks),
        cached=cached,
        row=ROW,
        head=tuple((rows, _product_rate(rows, width, columns, device, model.dtype)) for rows in at_once),
        float32=_product_rate(1024, 1024, 1024, device, torch.float32),
        float64=_product_rate(16, 1024, 1024, device, torch.float64),  # blocks as a search for eigenpairs multiplies
        eigh=_eigh_seconds(size, device) / size**3,
        logit=_logit_seconds(min(columns, NUMBERS // width), device),
        adam=_adam_seconds(device),
        copied=_copy_rate(device),
    )


def _one_block(model: Any, layer: int, device: torch.device) -> Any:
    """The body of the model with one of its blocks, on a device, with no weights to speak of."""
    small = copy.deepcopy(model)
    path, blocks = decoder_blocks(small)
    parent, _, name = path.rpartition(".")
    setattr(small.get_submodule(parent), name, nn.ModuleList([blocks[layer]]))
    for module in blocks[layer].modules():
        if hasattr(module, "layer_idx"):  # where it keeps keys and values
            module.layer_idx = 0  # type: ignore[assignment]  # torch takes what it does not know for a module
    small.set_input_embeddings(nn.Embedding(1, int(text_config(model).hidden_size), device="meta", dtype=model.dtype))
    body = small.base_model.to_empty(device=device)
    for tensor in chain(body.parameters(), body.buffers()):
        tensor.requires_grad_(False).fill_(0.01 if tensor.is_floating_point() else 0)
    return body.eval()


def _forward_backward(body: Any, inputs: Tensor, device: torch.device) -> tuple[float, float]:
    """Seconds of a forward pass, and of the gradient in its inputs."""
    given: list[Tensor] = []

    def forward() -> None:
        given[:] = [body(inputs_embeds=inputs, use_cache=False).last_hidden_state]

    def backward() -> None:
        torch.autograd.grad(given[0], inputs, torch.ones_like(given[0]), retain_graph=True)

    return _seconds(forward, device), _seconds(backward, device)


@torch.no_grad()
def _cached(body: Any, rows: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a forward pass over one more token of rows; the cache grows by it."""
    known = [body(inputs_embeds=torch.zeros(rows, ROW, width, device=device, dtype=dtype), use_cache=True)[CACHE]]
    token = torch.zeros(rows, 1, width, device=device, dtype=dtype)

    def step() -> None:
        known[:] = [body(inputs_embeds=token, use_cache=True, **{CACHE: known[0]})[CACHE]]

    return _seconds(step, device)


def _product_rate(rows: int, inner: int, columns: int, device: torch.device, dtype: torch.dtype) -> float:
    left = torch.full((rows, inner), 0.5, device=device, dtype=dtype)
    right = torch.full((inner, columns), 0.5, device=device, dtype=dtype)
    return 2 * rows * inner * columns / _seconds(lambda: left @ right, device)


def _eigh_seconds(size: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = (root @ root.T).to(device)
    return _seconds(lambda: torch.linalg.eigh(matrix), device)


def _logit_seconds(columns: int, device: torch.device) -> float:
    """Seconds per logit of what :mod:`crispedit.fisher` does with them."""
    logits = torch.zeros(NUMBERS // columns or 1, columns, device=device, requires_grad=True)

    def run() -> None:
        labels = sampled(logits.detach(), torch.rand(len(logits)))
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        torch.autograd.grad(loss, logits)

    return _seconds(run, device) / logits.numel()


def _adam_seconds(device: torch.device) -> float:
    """Seconds of a step per number."""
    parameter = torch.zeros(NUMBERS // 4, device=device)
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.Adam([parameter], lr=1e-3)
    return _seconds(optimizer.step, device) / parameter.numel()


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(4 * NUMBERS, device=device)
    target = torch.zeros_like(source)
    return 4 * source.numel() / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some runs after a first one that warms up: of three at least, unless they take too long."""
    times: list[float] = []
    started = time.perf_counter()

    def within(share: float) -> bool:
        return time.perf_counter() - started < share * BUDGET

    while len(times) < 2 or (len(times) < 4 and within(4)) or (len(times) < 20 and within(1 / 4)):
        before = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
    return median(times[1:])
