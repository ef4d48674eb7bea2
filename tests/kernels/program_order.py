"""A kernel that writes which block and head each of its programs has."""

import triton
import triton.language as tl

from dit_accel.kernels.block_sparse.triton_tokens import block_and_head, program_number


@triton.jit
def order_kernel(order, blocks, dense):
    block, head = block_and_head(program_number(), tl.num_programs(1), blocks - dense, dense)
    tl.store(order + 2 * program_number(), block)
    tl.store(order + 2 * program_number() + 1, head)
