"""Quantised bases and the residual they leave."""

from .nf4 import QuantisedWeight, dequantise, quantise, residual

__all__ = ["QuantisedWeight", "dequantise", "quantise", "residual"]
