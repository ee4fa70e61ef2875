"""Weights in few bits: linear layers over integers, and how the integers are chosen."""

from mtnlg.quantization.aware import round_in_training
from mtnlg.quantization.calibration import METHODS, calibrate
from mtnlg.quantization.linear import QuantizedLinear
from mtnlg.quantization.model import (
    codes_of_weights,
    converted,
    num_quantized,
    quantize_model,
    quantized_linears,
)
from mtnlg.quantization.numbers import Codes, dequantize, quantize

__all__ = [
    "METHODS",
    "Codes",
    "QuantizedLinear",
    "calibrate",
    "codes_of_weights",
    "converted",
    "dequantize",
    "num_quantized",
    "quantize",
    "quantize_model",
    "quantized_linears",
    "round_in_training",
]
