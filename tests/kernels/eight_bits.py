"""What `triton8` computes, in PyTorch; and how far rounding to 8 bits takes it from the exact result."""

import itertools
import math
from typing import NamedTuple

import torch

from dit_accel.kernels.block_sparse import reference
from dit_accel.kernels.block_sparse.geometry import query_placement, read_placements

UNIT = 2.0**-11  # half the distance of fp16 numbers, relative
PRODUCTS = 4  # fp16 products of 16 keys whose sums are rounded in a step of 64 keys
SIGMAS = 6.0  # of a sum of independent roundings; exceeded once in 5e8 numbers


class Sample(NamedTuple):
    """One head of one sample, without padding, for a scale above 0.

    q, k: fp32 [N, D]; v: fp64 [N, D].
    seen: bool [Nq, Nk], the allowed pairs.
    rows, columns: where queries and keys lie in memory.
    peak_q, peak_k: fp32 [N, 1], the largest magnitude of a query, and of the centred keys of a key's block.
    mean: fp32 [D], of the keys.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    peak_q: torch.Tensor
    peak_k: torch.Tensor
    mean: torch.Tensor

    def steps(self):
        """The size of a step of each row in 8 bits: fp32 [N, 1] of queries and of keys."""
        return self.peak_q / 127, self.peak_k / 127

    def integers(self):
        """Queries and centred keys in steps, in fp64."""
        rows = (self.q, self.peak_q), (self.k - self.mean, self.peak_k)
        # a number over a tensor would be the number times the reciprocal, which is rounded twice
        factors = (torch.where(peak > 0, torch.full_like(peak, 127) / peak, 0) for _, peak in rows)
        return tuple(torch.floor(x * factor + 0.5).double() for (x, _), factor in zip(rows, factors, strict=True))


def samples(problem, means=None):
    """Sample, head and `Sample` of each head of a problem; keys that are padding are left out.

    means: fp32 [B H, D or more], the mean keys that a kernel found; None: the means. Sums differ by their order, and a
    number that lies between two steps then falls to the other one.
    """
    geometry = problem.geometry()
    mask = reference.token_mask(problem.block_lists(), geometry)
    grid, blocks = geometry.key_order.grid, geometry.key_order.block_of_token()
    for b, place in enumerate(read_placements(geometry, len(problem.q), problem.k.shape[2], problem.segments())):
        rows = query_placement(geometry, place).positions(geometry.query_order.grid)
        valid = torch.arange(grid.tokens) < grid.visual + grid.conditioning + place.text_len
        columns, column_blocks = place.positions(grid)[valid], blocks[valid]
        for h in range(problem.q.shape[1]):
            seen = (mask[b, h] if mask.ndim == 4 else mask)[:, valid]
            # a scale below 0 is moved into q, so that ties fall to the same side
            sign = 1 if problem.scale >= 0 else -1
            q, k = sign * problem.q[b, h][rows].float(), problem.k[b, h][columns].float()
            v = problem.v[b, h][columns].double()
            mean = k.mean(0) if means is None else means[b * len(problem.q[0]) + h, : k.shape[1]]
            centred = (k - mean).abs().amax(-1)
            peaks = torch.zeros(geometry.key_order.blocks).scatter_reduce(0, column_blocks, centred, "amax")
            peak_q, peak_k = q.abs().amax(-1, keepdim=True), peaks[column_blocks, None]
            yield b, h, Sample(q, k, v, seen, rows, columns, peak_q, peak_k, mean)


def quantised_attention(sample, scale):
    """Output and LSE from q and k in steps, in fp64, and the sums of p abs(v) that bound what fp16 adds."""
    (q8, k8), (step_q, step_k) = sample.integers(), sample.steps()
    logits = (q8 @ k8.mT) * step_q.double() * step_k.double().mT * scale
    shift = (sample.q.double() @ sample.mean.double())[:, None] * scale
    logits = (logits + shift).masked_fill(~sample.seen, -torch.inf)
    lse = logits.logsumexp(-1)
    p = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[:, None]).exp()
    return p @ sample.v, lse, p @ sample.v.abs()


def fp16_error(sample, magnitudes):
    """Most that fp16 weights and sums add to an output: p and each of the sums are rounded, which may truncate.

    Besides, fp16 has no numbers below 2^-24: of weights up to 2^4 and of sums of values up to 2^5.
    """
    relative = (1 + 2 * PRODUCTS) * UNIT * magnitudes
    steps = math.ceil(len(sample.v) / 16) * 2 ** -(24 + 4 + 4)
    return relative + (len(sample.v) * 2.0**-28 + steps) * sample.v.abs().amax(0)


def rounding_deviation(sample, scale):
    """The standard deviation of the output's error by 8 bits, to first order: fp64, shape of the output.

    A rounded number is off by an error that is uniform over a step. Those of a key and a channel, and of a query and
    a channel, are independent. With p and o exact, a logit's error e changes an output by p e (v - o).
    """
    q, centred = sample.q.double(), (sample.k - sample.mean).double()
    step_q, step_k = (step.double() for step in sample.steps())
    logits = (q @ centred.mT * scale).masked_fill(~sample.seen, -torch.inf)
    p = torch.where(sample.seen.any(-1, keepdim=True), logits.softmax(-1), 0.0)
    deviations = sample.v - (p @ sample.v)[:, None]  # [Nq, Nk, D]
    by_keys = torch.einsum("qk,qkd->qd", (p * step_k.mT).square(), deviations.square())
    by_keys = by_keys * q.square().sum(-1, keepdim=True)
    by_queries = torch.einsum("qk,kc,qkd->qcd", p, centred, deviations).square().sum(1) * step_q.square()
    first = scale * ((by_keys + by_queries) / 12).sqrt()
    pair = step_k.mT.square() * q.square().sum(-1, keepdim=True)
    pair = pair + step_q.square() * centred.square().sum(-1)
    second = (p * (SIGMAS * scale) ** 2 * pair / 12)[..., None] * deviations.abs()
    return first, second.sum(1)


def main():
    """The relative error of an output by 8 bits, next to keys that are not centred; one head of 2,048 tokens.

    Blocks of 128 x 64, a quarter of them listed; bf16 inputs. What fp16 adds is not counted.
    """
    for dim, case in itertools.product((64, 128), ("random", "twice as large", "outliers", "outliers that vary")):
        torch.manual_seed(0)
        listed = torch.rand(16, 32).topk(8, -1).indices
        seen = torch.zeros(16, 32, dtype=torch.bool).scatter_(1, listed, True)
        seen = seen.repeat_interleave(128, 0).repeat_interleave(64, 1)
        q, k, v = (torch.randn(2048, dim) for _ in range(3))
        if case == "twice as large":
            q, k = 2 * q, 2 * k
        if case.startswith("outliers"):
            k[:, ::16] += 40.0
        if case.endswith("vary"):
            k[:, ::16] += 8.0 * torch.randn(2048, dim // 16)
        q, k, v = (x.bfloat16().float() for x in (q, k, v))
        scale = dim**-0.5
        exact = (q.double() @ k.double().mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()
        errors = []
        for mean in (k.mean(0), torch.zeros(dim)):
            peak_k = (k - mean).abs().unflatten(0, (-1, 64)).amax((1, 2)).repeat_interleave(64)[:, None]
            rows = torch.arange(2048)
            sample = Sample(q, k, v.double(), seen, rows, rows, q.abs().amax(-1, keepdim=True), peak_k, mean)
            out = quantised_attention(sample, scale)[0]
            errors.append(float((out - exact).norm() / exact.norm()))
        print(f"D={dim} {case}: {errors[0]:.4f}, not centred {errors[1]:.4f}")


if __name__ == "__main__":
    main()
