"""What a window of tries computes in place of loading it."""

import pytest
import torch
import triton
import triton.language as tl

from tokenmix_kernels.kernels.window import ratio_factors
from tokenmix_kernels.tables import ratio_table


@triton.jit
def factors_kernel(words, out, COUNT: tl.constexpr):
    n = tl.arange(0, COUNT)
    tl.store(out + n, ratio_factors(tl.load(words + n).to(tl.uint32, bitcast=True)))


@pytest.mark.devices("interpreter", "gpu")
def test_computed_ratios_are_the_table_whatever_the_other_bits_of_a_word_are(device):
    table = torch.tensor(ratio_table(), dtype=torch.int32)
    for other in (0, 0x7FFFFC00, -0x40000000):
        words = device.put(torch.arange(len(table), dtype=torch.int32) | other)
        factors = torch.empty_like(words)
        factors_kernel[(1,)](words, factors, len(table))
        assert torch.equal(factors.cpu(), table)
