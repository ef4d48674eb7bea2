"""The Gluon forward with Triton's gradients, which a GPU has run; both read the same lists, and the same LSE."""

from dit_accel.kernels.block_sparse.gluon.launches import forward
from dit_accel.kernels.block_sparse.triton import backward

__all__ = ["backward", "forward"]
