"""LoRA, and PEFT's tuners beside it: Adam on an adapter of every matrix, which is merged into the weights.

    lora     W = W₀ + (α/r) B A                  A (r, d_in) random, B (d_out, r) zero at the start
    adalora  W = W₀ + (α/r) P Λ Q                Λ diagonal, zero at the start; + ω mean of ‖PᵀP − I‖ and ‖Q Qᵀ − I‖;
                                                 the least important entries of Λ are set to zero as training goes on
    osf      W = U₁ S₁ V₁ + U₂ diag(s₂) V₂        W₀ = U S V; of the largest singular values U₁ S₁ V₁ stays as it is,
                                                 and U₂, V₂ are kept orthogonal to U₁, V₁
    corda    W = W₀ + (α/r) (B A − B₀ A₀)         (α/r) B₀ A₀ C: the r smallest singular values of W₀ C, C = E[a aᵀ]

Norms are Frobenius norms, r the rank. Capability texts give C (CorDA's knowledge-preserved mode). LoRA: arXiv
2106.09685; AdaLoRA: arXiv 2303.10512; OSF: arXiv 2504.07097; CorDA: arXiv 2406.05223; what CrispEdit (arXiv 2602.15823)
compares with as LoRA is AdaLoRA whose ranks are never allocated, the preset ``published``.
"""

import importlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from .. import distributed
from ..adam import adam
from ..errors import ConfigError
from ..models import EditMatrix, Part, edit_matrices
from ..moments import MomentSum
from ..texts import text_batches
from ..training import rows_per_step
from ._gradient import PUBLISHED, GradientConfig, train_in
from .base import EditProblem, Presets, Round

Tuner = Literal["lora", "adalora", "osf", "corda"]
ADAPTER = "default"
"""What PEFT calls an adapter that is given no name."""
WARM_UP, SETTLING = 0.1, 0.3
"""AdaLoRA allocates ranks after the first tenth of the steps, and not in the last three (``tinit``, ``tfinal``)."""
DAMPING = 0.01
"""Is added to the diagonal of CorDA's C, in parts of its mean, so that C can be inverted; as in the paper's code."""
PACE = {"lora": 0.25, "adalora": 2.7, "corda": 0.25}
"""The learning rate that ``auto`` stands for, times √(α d_in)."""
OSF_PACE = 1.0
"""That of ``osf``, times d_in."""


class Config(GradientConfig):
    """Settings of adapters: those of the loop, and of PEFT's tuner.

    There is no dropout: the loop is deterministic, and a loss is that of the weights as they are. Early stops look at
    the edit loss without AdaLoRA's penalty.

    Args:
        tuner: ``lora``, ``adalora``, ``osf`` or ``corda``.
        parts: Which matrices of a block get an adapter: ``query``, ``value``, ``down``, ``gate``, ``up``.
        rank: r, of every adapter; with ``adalora``, at the start. Not of ``osf``.
        alpha: α; an adapter counts α/r times.
        target_rank: The average rank at which ``adalora`` arrives; with that of the start, ranks are never allocated.
        orthogonality: ω, the weight of AdaLoRA's penalty.
        preserved: The share of the singular directions that ``osf`` leaves as they are, those of the largest values.
        project_updates: Whether ``osf`` projects what Adam makes of gradients, too; PEFT projects the gradients alone.
    """

    presets: ClassVar[Presets] = {
        "lora": {"tuner": "lora"},
        "adalora": {"tuner": "adalora", "rank": 48, "target_rank": 32, "alpha": 128.0},
        "osf": {"tuner": "osf"},
        "osf-peft": {"tuner": "osf", "project_updates": False},
        "corda": {"tuner": "corda"},
        # its loss counts the penalty when it is compared with the bound, which is then never reached; its dropout (0.1)
        # is left out
        "published": {
            **PUBLISHED,
            "tuner": "adalora",
            "parts": ("query", "value"),
            "rank": 12,
            "target_rank": 12,
            "alpha": 32.0,
            "stop_loss": 0.0,
        },
    }

    tuner: Tuner = "lora"
    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = ("down",)
    rank: Annotated[int, Field(ge=1)] = 64
    alpha: Annotated[float, Field(gt=0)] = 64.0
    target_rank: Annotated[int, Field(ge=1)] = 32
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    preserved: Annotated[float, Field(gt=0, lt=1)] = 0.5
    project_updates: bool = True

    @field_validator("parts", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """``query,value`` of a command line as a list; in a sweep, where commas are between values, ``query+value``."""
        return given.replace("+", ",").split(",") if isinstance(given, str) else given

    def needs_texts(self) -> bool:
        """For CorDA's covariance."""
        return self.tuner == "corda"

    def matrices(self, model: Any, layers: Sequence[int] | None) -> tuple[EditMatrix, ...]:
        """The chosen parts of the blocks.

        Args:
            model: A causal LM.
            layers: The decoder blocks that the user names, if any.

        Returns:
            The matrices.

        Raises:
            ConfigError: PEFT is missing, or the rank does not fit the matrices or AdaLoRA's target.
        """
        _import_peft()
        found = edit_matrices(model, layers, self.parts)
        smallest = min(found, key=lambda matrix: min(matrix.shape))
        d_out, d_in = smallest.shape
        if self.tuner == "osf":
            if int(self.preserved * min(d_out, d_in)) < 1:
                raise ConfigError(
                    f"preserved is {self.preserved}: of {smallest.name}, {d_out} × {d_in}, that is no direction; "
                    f"at least {1 / min(d_out, d_in):.2g} is needed"
                )
        elif self.rank > min(d_out, d_in):
            raise ConfigError(f"rank is {self.rank}; {smallest.name} is {d_out} × {d_in}: at most {min(d_out, d_in)}")
        if self.tuner == "adalora" and self.target_rank > self.rank:
            raise ConfigError(f"target_rank is {self.target_rank}; it must be at most the rank, {self.rank}")
        return found

    def allocates(self) -> bool:
        """Whether ranks change."""
        return self.tuner == "adalora" and self.target_rank < self.rank

    def rate(self, d_in: int) -> float:
        """The learning rate.

        ``auto`` is a rule here, and no search: B A begins as a saddle (B is zero), so that the loss hardly falls in the
        first epochs at any rate worth having, and trials of a few epochs prefer rates that wreck the model. A step of
        Adam moves B A by the rate times A, of size 1/√d_in at the start, and then by the rate times B; so the rate that
        suits falls like 1/√d_in, where that for a matrix falls like 1/d_in.

        Args:
            d_in: Of the widest matrix.

        Returns:
            The rate.
        """
        if self.lr != "auto":
            return self.lr
        return OSF_PACE / d_in if self.tuner == "osf" else PACE[self.tuner] / (self.alpha * d_in) ** 0.5

    def of_peft(self, peft: Any, steps: int) -> Any:
        """The settings as PEFT's.

        Args:
            peft: The package.
            steps: Of training, at most.

        Returns:
            A ``PeftConfig`` for a list of linear maps.
        """
        every = {"target_modules": r"\d+"}
        if self.tuner == "osf":
            return peft.OSFConfig(effective_rank=self.preserved, **every)
        common = {"lora_alpha": self.alpha, "lora_dropout": 0.0, **every}
        if self.tuner == "adalora":
            return peft.AdaLoraConfig(
                init_r=self.rank,
                target_r=self.target_rank,
                tinit=int(WARM_UP * steps),
                tfinal=int(SETTLING * steps),
                total_step=steps,
                orth_reg_weight=self.orthogonality,
                **common,
            )
        if self.tuner == "corda":
            kind = {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}
            return peft.LoraConfig(r=self.rank, **kind, **common)
        return peft.LoraConfig(r=self.rank, **common)


def _import_peft() -> Any:
    """The package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(f"the editors lora and lora-seq need PEFT ({error}): pip install 'crispedit[peft]'") from None


class Adapter:
    """What a tuner of PEFT adds to matrices, as a trainee of the loop.

    PEFT's layers are made around stand-ins for the matrices, and the model never meets them: it has W₀ + ΔW in its own
    weights at every step. The gradient in W goes back through ΔW, as PEFT computes it, to the adapter's parameters;
    by the chain rule that is the gradient which a forward pass through PEFT's layers gives. So nothing has to be merged
    or taken out again, and replay, float32 masters, ``Conv1D`` and fused projections are what they are without an
    adapter.

    Args:
        problem: What is to be edited; the matrices as they are now are W₀.
        config: Settings.
        steps: Of training, at most.
        seed: Of the adapter's first values.
    """

    weigh = None
    """All rows count alike."""

    def __init__(self, problem: EditProblem, config: Config, *, steps: int, seed: int) -> None:
        peft = _import_peft()
        self.config, self.matrices, self.steps = config, problem.matrices, 0
        self._device = problem.model.get_output_embeddings().weight.device  # where the loss is
        stand_ins = nn.ModuleList(_stand_in(matrix) for matrix in self.matrices)
        settings = config.of_peft(peft, steps)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # PEFT draws on the CPU; torch.manual_seed would reach GPUs
            if config.tuner == "corda":
                _give_directions(problem, stand_ins, config.rank)
            self._tuner = peft.get_peft_model(stand_ins, settings).base_model
        self.layers: list[Any] = list(stand_ins)
        """PEFT's, one per matrix."""
        self.parameters: Sequence[Tensor] = [p for layer in self.layers for p in layer.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.contiguous()
        self._starts = [parameter.detach().clone() for parameter in self.parameters]
        self._penalised: list[Tensor] = []
        if config.tuner == "adalora" and config.orthogonality > 0:
            self._penalised = [p for layer in self.layers for p in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])]
        with torch.no_grad():
            # ΔW is zero at the start, or else (CorDA) a part of W₀
            self._originals = [m.weight - delta for m, delta in zip(self.matrices, self.deltas(), strict=True)]

    def deltas(self) -> Iterator[Tensor]:
        """What is added to each of the matrices, (d_out, d_in) float32, as PEFT would merge it."""
        for layer in self.layers:
            yield layer.get_delta_weight(ADAPTER)

    def differentiated(self) -> Sequence[Tensor]:
        """The matrices, for the loss, and then the parameters that the penalty is on."""
        return [*(matrix.parameter for matrix in self.matrices), *self._penalised]

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Adam."""
        return adam(self.parameters, lr)

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Back through ΔW; PEFT's hooks on the parameters project gradients there, with ``osf``."""
        for parameter in self.parameters:
            parameter.grad = None
        for matrix, delta, gradient in zip(self.matrices, self.deltas(), gradients, strict=False):
            delta.backward(matrix.as_weight(gradient))  # type: ignore[no-untyped-call]
        for parameter, gradient in zip(self._penalised, gradients[len(self.matrices) :], strict=True):
            assert parameter.grad is not None
            parameter.grad += gradient
        distributed.sum_tensors([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        self.steps += 1

    @torch.no_grad()
    def apply(self) -> None:
        """W₀ + ΔW; after a step, what the tuner does between steps comes first."""
        if self.steps and self.config.allocates():
            self._tuner.update_and_allocate(self.steps)
        if self.steps and self.config.tuner == "osf" and self.config.project_updates:
            self._project()
        for matrix, delta, original in zip(self.matrices, self.deltas(), self._originals, strict=True):
            torch.add(original, delta, out=matrix.weight)

    def _project(self) -> None:
        """U₂ and V₂ made orthogonal to U₁ and V₁ again, by the projection that PEFT has hung on their gradients.

        Adam rescales a projected gradient element by element, and what it makes of it is no longer orthogonal.
        """
        for layer in self.layers:
            for name in ("U_low", "V_low"):
                parameter = layer.osf_svd_params[ADAPTER][name]
                parameter.grad = None
                parameter.backward(parameter.detach())
                parameter.copy_(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def reset(self) -> None:
        """The parameters as they were, and the allocator too."""
        for parameter, start in zip(self.parameters, self._starts, strict=True):
            parameter.copy_(start)
            parameter.grad = None
        self.steps = 0
        if self.config.allocates():
            self._tuner.rankallocator.reset_ipt()
            self._tuner.peft_config[ADAPTER].rank_pattern = None

    def after_epoch(self, low: bool) -> bool:
        """Once the loss is low."""
        return low

    def penalty(self) -> Tensor | float:
        """Half (ω) of the mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ over all adapters (AdaLoRA, equation 4)."""
        if not self._penalised:
            return 0.0
        off = []
        for factor in self._penalised:
            gram = factor @ factor.T if factor.shape[0] < factor.shape[1] else factor.T @ factor
            off.append((gram - torch.eye(len(gram), device=gram.device)).norm().to(self._device))
        return self.config.orthogonality * torch.stack(off).mean()

    def details(self) -> dict[str, Any]:
        """What a user may want to know of it, JSON-ready."""
        found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in self.parameters)}
        if self.config.allocates():
            ranks = [int(layer.lora_E[ADAPTER].count_nonzero()) for layer in self.layers]
            found["ranks"] = dict(zip((matrix.name for matrix in self.matrices), ranks, strict=True))
        return found


def _stand_in(matrix: EditMatrix) -> nn.Linear:
    """A linear map with a matrix's numbers (not a copy of them), whatever kind of module the matrix is in."""
    d_out, d_in = matrix.shape
    linear = nn.Linear(d_in, d_out, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.weight, requires_grad=False)
    return linear


@torch.no_grad()
def _give_directions(problem: EditProblem, stand_ins: nn.ModuleList, rank: int) -> None:
    """Hands PEFT the directions of the smallest singular values of W₀ C, as it takes them from its own ``eigens``.

    PEFT's own preparation scales every text by its largest number, inverts in float32 with whatever damping that needs,
    and imports a package that it does not require (0.21.2).
    """
    for matrix, stand_in, moment in zip(problem.matrices, stand_ins, _input_moments(problem), strict=True):
        C = moment.double()
        C /= C.diagonal().mean()
        C.diagonal().add_(DAMPING)
        U, S, V = torch.linalg.svd(matrix.weight.double() @ C, full_matrices=False)
        right = torch.linalg.solve(C, V[-rank:].T)  # (V C⁻¹)ᵀ: C is symmetric
        found = {"U_WC": U[:, -rank:].float(), "S_WC": S[-rank:].float(), "V_WC": right.float()}
        setattr(stand_in, "eigens", SimpleNamespace(**found))  # noqa: B010


def _input_moments(problem: EditProblem) -> list[Tensor]:
    """E[a aᵀ] of every matrix over the tokens of the capability texts, (d_in, d_in) float32."""
    assert problem.texts is not None
    model, modules = problem.model, [matrix.module for matrix in problem.matrices]
    sums = [MomentSum(matrix.shape[1], "dense", matrix.parameter.device) for matrix in problem.matrices]
    real = torch.empty(0, dtype=torch.bool)

    def adding(total: MomentSum) -> Any:
        return lambda _, arguments: total.add(arguments[0][real.to(arguments[0].device)])

    handles = [module.register_forward_pre_hook(adding(total)) for module, total in zip(modules, sums, strict=True)]
    try:
        batches = text_batches(model, problem.prompter.tokenizer, problem.texts.fit)
        for number, batch in enumerate(batches):
            real = batch.mask.bool()
            given = batch.to(model.get_input_embeddings().weight.device)
            model.base_model(input_ids=given.ids, attention_mask=given.mask, use_cache=False)
            problem.progress("covariance", number + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    return [total.total / tokens for total in sums]


def train_adapter(problem: EditProblem, config: Config, chosen: range) -> Round:
    """Trains some of the edits into a new adapter, which is in the weights then.

    Args:
        problem: What is to be edited.
        config: Settings.
        chosen: Indices of edits.

    Returns:
        The round.
    """
    per_epoch = -(-len(chosen) // rows_per_step(len(chosen), config.batch_size))
    adapter = Adapter(problem, config, steps=config.epochs * per_epoch, seed=problem.seed + chosen.start)
    start = config.replay
    if start == "matrix" and config.parts != ("down",):
        start = "block"  # the matrix's own output is not all that changes in its block
    rate = config.rate(max(matrix.shape[1] for matrix in problem.matrices))
    trace = train_in(problem, config, adapter, chosen, lr=rate, start=start)
    return Round(num_edits=chosen.stop, trace=trace, details=adapter.details())


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits in one round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round.
    """
    yield train_adapter(problem, config, range(len(problem.edits)))
