"""Task weightings as their papers write them: float64, number by number, with loops over tasks and rows.

Nothing of pipeline/ is imported. Gradients are lists of numbers, or tensors that autograd goes through.
"""

# Shapes: B rows, T tasks, P parameters, E width.

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Vector = Sequence[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def combined(weights: Vector, gradients: Sequence[Vector]) -> list[float]:
    """sum_t w_t g_t."""
    return [dot(weights, column) for column in zip(*gradients, strict=True)]


def dwa(history: Sequence[Vector], temperature: float, window: int) -> list[list[float]]:
    """The lambdas of every step and of the one after (MTAN, eq. 7); history: losses a step, 0 for a task not observed."""
    tasks = len(history[0])
    lambdas, means, out = [1.0] * tasks, list[list[float]](), [[1.0] * tasks]
    for step in range(1, len(history) + 1):
        if step % window == 0:
            part = history[step - window : step]
            seen = [[losses[t] for losses in part if losses[t] != 0] for t in range(tasks)]
            means.append([sum(values) / len(values) if values else 0.0 for values in seen])
            last, before = means[-1], means[-2] if len(means) > 1 else [0.0] * tasks
            rates = [a / b if a and b else 1.0 for a, b in zip(last, before, strict=True)]
            powers = [math.exp(rate / temperature) for rate in rates]
            lambdas = [tasks * power / sum(powers) for power in powers]
        out.append(lambdas)
    return out


def famo(history: Sequence[Vector], lr: float, gamma: float) -> list[list[float]]:
    """The weights of every step (FAMO, algorithm 1), Adam on the logits written out; 0: a task that is not observed."""
    tasks, updates = len(history[0]), 0
    xi, first, second = [0.0] * tasks, [0.0] * tasks, [0.0] * tasks
    out = []
    for step, losses in enumerate(history):
        z = [math.exp(x) / sum(math.exp(y) for y in xi) for x in xi]
        before = history[step - 1] if step else [0.0] * tasks
        fall = [
            math.log(b + 1e-8) - math.log(a + 1e-8) if a and b else 0.0 for a, b in zip(losses, before, strict=True)
        ]
        updates += any(a and b for a, b in zip(losses, before, strict=True))
        for t in range(tasks):
            # d sum_s z_s fall_s / d xi_t, with dz_s / dxi_t = z_s (1[s = t] - z_t)
            delta = sum(z[s] * ((s == t) - z[t]) * fall[s] for s in range(tasks))
            gradient = delta + gamma * xi[t]
            first[t] = 0.9 * first[t] + 0.1 * gradient
            second[t] = 0.999 * second[t] + 0.001 * gradient**2
            if updates:
                m, v = first[t] / (1 - 0.9**updates), second[t] / (1 - 0.999**updates)
                xi[t] -= lr * m / (math.sqrt(v) + 1e-8)
        z = [math.exp(x) / sum(math.exp(y) for y in xi) for x in xi]
        seen = [t for t in range(tasks) if losses[t]]
        c = 1 / sum(z[t] / (losses[t] + 1e-8) for t in seen) if seen else 0.0
        out.append([c * z[t] / (losses[t] + 1e-8) if t in seen else 0.0 for t in range(tasks)])
    return out


def stch(losses: Vector, reference: Vector, weights: Vector, mu: float) -> tuple[float, list[float]]:
    """T mu log sum_t exp(w_t log(L_t / R_t) / mu) over the observed tasks, and its derivatives by the losses."""
    leaf = torch.tensor(losses, dtype=torch.float64).requires_grad_()
    seen = [t for t in range(len(losses)) if losses[t]]
    total = torch.zeros((), dtype=torch.float64)
    for t in seen:
        total = total + torch.exp(weights[t] * torch.log((leaf[t] + 1e-8) / (reference[t] + 1e-8)) / mu)
    if not seen:
        return 0.0, [0.0] * len(losses)
    value = len(seen) * mu * torch.log(total)
    return value.item(), torch.autograd.grad(value, leaf)[0].tolist()


def shortest(gradients: Sequence[Vector]) -> list[float]:
    """The shortest convex combination, as the best of all affine ones over a subset that are convex."""
    best: list[float] = []
    for size in range(1, len(gradients) + 1):
        for subset in itertools.combinations(range(len(gradients)), size):
            system = torch.ones(size + 1, size + 1, dtype=torch.float64)
            system[size, size] = 0
            for i, j in itertools.product(range(size), repeat=2):
                system[i, j] = dot(gradients[subset[i]], gradients[subset[j]])
            target = torch.zeros(size + 1, dtype=torch.float64)
            target[size] = 1
            weights = (torch.linalg.pinv(system) @ target)[:size].tolist()
            if min(weights) > -1e-9 and abs(sum(weights) - 1) < 1e-9:
                found = combined(weights, [gradients[t] for t in subset])
                if not best or norm(found) < norm(best):
                    best = found
    return best


def fair(gradients: Sequence[Vector], alpha: float, ridge: float = 0.0) -> list[float]:
    """w > 0 with <g_t, sum_s w_s g_s> = w_t^(-1/alpha) for every t, one w_t after the other, by bisection."""
    tasks = len(gradients)
    products = [[dot(a, b) * (1 + ridge * (s == t)) for s, a in enumerate(gradients)] for t, b in enumerate(gradients)]
    w = [1.0] * tasks
    for _ in range(1000):
        before = list(w)
        for t in range(tasks):
            rest = sum(products[t][s] * w[s] for s in range(tasks) if s != t)
            low, high = 1e-5, 1e5
            for _ in range(60):
                middle = math.sqrt(low * high)
                if products[t][t] * middle + rest > middle ** (-1 / alpha):
                    high = middle
                else:
                    low = middle
            w[t] = math.sqrt(low * high)
        if all(abs(a - b) <= 1e-11 * a for a, b in zip(w, before, strict=True)):
            break
    return w


def surgery(gradients: Sequence[Vector], order: Sequence[Sequence[int]]) -> list[list[float]]:
    """Algorithm 1 of PCGrad, number by number: each task's gradient after its projections."""
    done = []
    for t, gradient in enumerate(gradients):
        g = list(gradient)
        for other in order[t]:
            h = gradients[other]
            product = dot(g, h)
            if product < 0:
                square = dot(h, h)
                g = [a - product / square * b for a, b in zip(g, h, strict=True)]
        done.append(g)
    return done


def aligned(gradients: Sequence[Vector], weights: Vector) -> list[float]:
    """sigma_min U V^T w for the singular value decomposition U Sigma V^T of the matrix with the gradients as columns."""
    matrix_PT = torch.tensor(gradients, dtype=torch.float64).T
    u, sigma, vh = torch.linalg.svd(matrix_PT, full_matrices=False)
    kept = [i for i, value in enumerate(sigma.tolist()) if value**2 > 1e-6 * sigma.max().item() ** 2]
    out = torch.zeros(len(matrix_PT), dtype=torch.float64)
    for i in kept:
        out += sigma[kept].min() * u[:, i] * (vh[i] @ torch.tensor(weights, dtype=torch.float64))
    return out.tolist()


def rep_mtl(
    saliency_BTE: Tensor, weight_B: Tensor, group: int, tsr: float, csa: float, temperature: float
) -> Tensor:  # fmt: skip
    """lambda_tsr L_tsr + lambda_csa L_csa (Rep-MTL, eq. 4 to 10) of rows with one place, matrices written out.

    A task that a row does not observe has a saliency of exactly 0.
    """
    rows, tasks, width = saliency_BTE.shape
    total = torch.zeros((), dtype=torch.float64)
    for b in range(rows):
        means = [sum(saliency_BTE[b, t, c] for c in range(width)) / width for t in range(tasks)]
        size = sum(abs(value) for value in means)
        shares = [abs(value) / size for value in means if value != 0]
        total = total + tsr * weight_B[b] * sum((-share * torch.log(share) for share in shares), 0 * size)
        total = total + csa * weight_B[b] * _alignment(saliency_BTE, b, group, temperature)
    return total


def _alignment(saliency_BTE: Tensor, b: int, group: int, temperature: float) -> Tensor:
    rows, tasks, _ = saliency_BTE.shape

    def anchor(row: int) -> Tensor:
        a_ET = saliency_BTE[row].T
        return a_ET @ a_ET.T

    def cosine(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum() / (one.norm() * other.norm())

    def seen(row: int) -> list[int]:
        return [t for t in range(tasks) if saliency_BTE[row, t].abs().sum() > 0]

    first = b // group * group
    others = [k for k in range(first, min(first + group, rows)) if k != b and seen(k)]
    if not others or not seen(b):
        return torch.zeros((), dtype=torch.float64)
    below = sum(torch.exp(cosine(anchor(b), anchor(k)) / temperature) for k in others)
    terms = []
    for t in seen(b):
        affinity = torch.outer(saliency_BTE[b, t], saliency_BTE[b, t])
        terms.append(-torch.log(torch.exp(cosine(anchor(b), affinity) / temperature) / below))
    return sum(terms) / len(terms)


def sharpness_aware(loss: Callable[[Tensor], Tensor], theta: Tensor, rho: float) -> Tensor:
    """The gradient at theta + rho g / |g| (Foret et al. 2021, eq. 2 and 3)."""
    leaf = theta.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    length = norm(gradient.tolist())
    moved = torch.tensor([p + rho * g / length for p, g in zip(theta.tolist(), gradient.tolist(), strict=True)])
    moved = moved.to(theta.dtype).requires_grad_()
    return torch.autograd.grad(loss(moved), moved)[0]
