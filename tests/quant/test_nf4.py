"""Plain-torch NF4 equals the library's bit for bit."""

import pytest
import torch

from rowscope import InputError
from rowscope.quant import dequantise, quantise, residual

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("scale", [1e-3, 0.02, 30.0])
@pytest.mark.parametrize("block_size", [64, 128])
def test_equal_to_bitsandbytes(scale, block_size):
    """Guards the reference: not one element differs from bitsandbytes' dequantised weight."""
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * scale
    weight[3] = 0
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=False)
    assert torch.equal(dequantise(quantise(weight, block_size)), functional.dequantize_4bit(packed, state))


def test_residual_completes_the_weight():
    """Guards the start of trained rows: base plus residual is the weight again, but for float32 rounding."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(dequantise(quantise(weight)) + residual(weight), weight, rtol=0, atol=1e-7)


def test_odd_sizes_are_refused():
    """Guards against silent padding."""
    with pytest.raises(InputError, match="does not divide into blocks of 64"):
        quantise(torch.zeros(3, 7))
