"""Dense truths: every quantity of the numerical core once more, by definition, in float64, at any price.

Nothing here uses the code under test beyond :class:`EditMatrix`, which says where a matrix lies in a model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from crispedit.models import EditMatrix

VOCABULARY = 64

# ---------------------------------------------------------------- models and rows


def tiny_llama(dtype: torch.dtype = torch.float32, *, hidden: int = 32, intermediate: int = 48, layers: int = 2):
    """A Llama with random weights, large enough that its next-token distributions are far from uniform.

    The last norm is scaled up: it bounds the logits, and with them the lowest loss that can be learned.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.model.norm.weight.data.fill_(3)
    return model.to(dtype).eval()


def tiny_gpt2(dtype: torch.dtype = torch.float32):
    """A GPT-2 with random weights, biases too: its down-projection is a ``Conv1D``, which stores Wᵀ."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_inner=48,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    model.transformer.ln_f.weight.data.fill_(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.2)
    return model.to(dtype).eval()


def random_rows(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Rows of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def relative(x: Tensor, truth: Tensor) -> float:
    """‖x − truth‖ / ‖truth‖ in Frobenius norm."""
    return float((x.double() - truth.double()).norm() / truth.double().norm())


# ---------------------------------------------------------------- subspace


def random_factor(eigenvalues: Tensor, seed: int) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(eigenvalues.double()) @ basis.T


def threshold_by_sorting(alpha: Tensor, beta: Tensor, energy: float) -> tuple[float, int, float, Tensor]:
    """(τ, number of high pairs, captured share, counts per row) from the sorted table of all products."""
    table = torch.outer(beta, alpha)
    products = table.flatten().sort(descending=True).values
    goal = energy * products.sum()
    if goal == 0:
        return float("inf"), 0, 0.0, torch.zeros(len(beta), dtype=torch.int64)
    k = min(int((products.cumsum(0) < goal).sum()) + 1, len(products))  # rounding may leave the whole sum short
    high = table >= products[k - 1]
    return float(products[k - 1]), int(high.sum()), float(table[high].sum() / products.sum()), high.sum(1)


def project_by_equation_6(A: Tensor, G: Tensor, energy: float, X: Tensor) -> Tensor:
    """U_G [(U_Gᵀ X U_A) ⊙ M] U_Aᵀ, all of it dense and in float64."""
    alpha, U_A = torch.linalg.eigh(A.double())
    beta, U_G = torch.linalg.eigh(G.double())
    tau = threshold_by_sorting(alpha, beta, energy)[0]
    M = torch.outer(beta, alpha) < tau
    return U_G @ ((U_G.T @ X.double() @ U_A) * M) @ U_A.T


def low_curvature_projector(A: Tensor, G: Tensor, energy: float) -> tuple[Tensor, float]:
    """The projector on row-major vec(W), from the eigenvectors of G ⊗ A itself, and the relative gap at the cut.

    Nothing Kronecker is used: k largest eigenvalues of one symmetric matrix hold the energy, the
    eigenvectors of all others span the subspace.
    """
    values, vectors = torch.linalg.eigh(torch.kron(G.double(), A.double()))
    values, vectors = values.flip(0), vectors.flip(1)
    k = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    low = vectors[:, k:]
    gap = float(1 - values[k] / values[k - 1]) if k < len(values) else 1.0
    return low @ low.T, gap


# ---------------------------------------------------------------- curvature


def run_with_offset(model, matrix: EditMatrix, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One unpadded sequence: logits (T, V), inputs a of the matrix (T, d_in), and a zero added to y = W a (T, d_out).

    A derivative with respect to that zero is the derivative with respect to the matrix's output.
    """
    offset = torch.zeros(len(ids), matrix.shape[0], dtype=model.dtype, requires_grad=True)
    inputs: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(arguments[0][0].detach())
        return output + offset

    handle = matrix.module.register_forward_hook(hook)
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    handle.remove()
    return logits, inputs[0], offset


def factors_by_loop(model, matrix: EditMatrix, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """A = E[a aᵀ] and G = E[g gᵀ] with the rows' own next tokens, token by token."""
    d_out, d_in = matrix.shape
    A, G = torch.zeros(d_in, d_in, dtype=torch.float64), torch.zeros(d_out, d_out, dtype=torch.float64)
    num_tokens = 0
    for ids in rows:
        logits, inputs, offset = run_with_offset(model, matrix, ids)
        loss = sum(-logits[t].log_softmax(-1)[ids[t + 1]] for t in range(len(ids) - 1))
        (gradients,) = torch.autograd.grad(loss, offset)
        for t in range(len(ids) - 1):
            A += torch.outer(inputs[t], inputs[t])
            G += torch.outer(gradients[t], gradients[t])
            num_tokens += 1
    return A / num_tokens, G / num_tokens


def _jacobian(logits: Tensor, of: Tensor) -> Tensor:
    """∂logits/∂of of one token, (V, \\*of.shape), one backward pass per logit."""
    return torch.stack([torch.autograd.grad(z, of, retain_graph=True)[0] for z in logits])


def _logits_hessian(logits: Tensor) -> Tensor:
    """diag(p) − p pᵀ: the Hessian of the cross-entropy in the logits, whatever the label."""
    p = logits.detach().softmax(-1)
    return torch.diag(p) - torch.outer(p, p)


def true_gradient_factor(model, matrix: EditMatrix, rows: Sequence[Sequence[int]]) -> Tensor:
    """G = E[g gᵀ] with the expectation over labels drawn from the model done exactly (no sampling).

    Labels of different tokens are independent, so their cross terms vanish: with J_ts = ∂z_t/∂y_s,
    E[g_s g_sᵀ] = Σ_t J_tsᵀ (diag(p_t) − p_t p_tᵀ) J_ts.
    """
    d_out, _ = matrix.shape
    G, num_tokens = torch.zeros(d_out, d_out, dtype=torch.float64), 0
    for ids in rows:
        logits, _, offset = run_with_offset(model, matrix, ids)
        for t in range(len(ids) - 1):
            J = _jacobian(logits[t], offset)
            G += torch.einsum("vsi,vw,wsj->ij", J, _logits_hessian(logits[t]), J)
            num_tokens += 1
    return G / num_tokens


def gauss_newton(model, matrix: EditMatrix, rows: Sequence[Sequence[int]]) -> Tensor:
    """The block of the Gauss–Newton Hessian for row-major vec(W): the mean over tokens of Jᵀ (diag(p) − p pᵀ) J."""
    size = matrix.parameter.numel()
    block, num_tokens = torch.zeros(size, size, dtype=torch.float64), 0
    for ids in rows:
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        for t in range(len(ids) - 1):
            J = _jacobian(logits[t], matrix.parameter)
            J = torch.stack([matrix.as_weight(row).flatten() for row in J])
            block += J.T @ _logits_hessian(logits[t]) @ J
            num_tokens += 1
    return block / num_tokens
