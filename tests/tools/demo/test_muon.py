import torch

from tools.demo.muon import DECAY, MOMENTUM, BatchedMuon, orthogonal


def test_singular_values_come_near_one():
    matrices = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonal(batch).float())
        assert values.min() > 0.5 and values.max() < 1.5


def test_a_batch_equals_torchs_muon_matrix_by_matrix():
    """Both run the five steps in bfloat16, which the sum over 32 products and another order leave 2^-8 apart."""
    torch.manual_seed(0)
    shapes = [(64, 32), (64, 32), (32, 64)]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    batched = BatchedMuon(weights)
    stock = torch.optim.Muon(copies, 0.01, DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for left, right in zip(weights, copies, strict=True):
            left.grad = torch.randn(left.shape)
            right.grad = left.grad.clone()
        batched.step(0.01)
        stock.step()
    assert all(weight.grad is None for weight in weights)
    for left, right in zip(weights, copies, strict=True):
        moved = 3 * 0.01 * 0.2 * 64**0.5  # three steps, each of singular values near one times this scale
        torch.testing.assert_close(left, right, rtol=0, atol=moved * 2**-5)
