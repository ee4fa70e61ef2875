"""Peak matrix-product rate of the device: the denominator of MFU and HFU."""

from __future__ import annotations

import time
from functools import cache

import torch

# Dense rates of the data sheets in TFLOP/s, without sparsity: (bf16/fp16, float32 without TF32).
# The first name that occurs in the device's name counts, so longer names stand before shorter ones.
GPU_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.4, 66.9),
    ("H800", 989.4, 66.9),
    ("H20", 148.0, 44.0),
    ("A100", 311.9, 19.5),
    ("A800", 311.9, 19.5),
    ("L40S", 362.1, 91.6),
    ("L4", 121.0, 30.3),
    ("A10G", 70.0, 31.5),
    ("A40", 149.7, 37.4),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)


def listed_gpu_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of the data sheet; ``None`` for a device that is not in the table."""
    for name, half, single in GPU_PEAKS:
        if name.lower() in device_name.lower():
            return 1e12 * (single if dtype == torch.float32 else half)
    return None


@cache
def measured_peak(device_type: str, dtype: torch.dtype, num_threads: int, seconds: float = 0.4) -> float:
    """What :func:`measure_peak` finds, once for each number of threads (torch's present setting)."""
    return measure_peak(device_type, dtype, seconds)


def measure_peak(device_type: str, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of the best of several square matrix products.

    Args:
        device_type: ``cpu`` or ``cuda``.
        dtype: of both factors.
        seconds: how long to go on trying for a better one (after one to warm up).
    """
    size = 1024 if device_type == "cpu" else 8192
    if device_type == "cpu" and dtype == torch.float16:
        size = 256  # most CPUs emulate it, a hundred times slower
    left = torch.randn(size, size, device=device_type, dtype=dtype)
    best = float("inf")
    _timed_product(left)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _timed_product(left))
    return 2.0 * size**3 / best


def _timed_product(left: torch.Tensor) -> float:
    if left.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    left @ left
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s one device can reach: listed for known GPUs, measured otherwise.

    A GPU that multiplies float32 as TF32 (``torch.set_float32_matmul_precision``) is measured too.
    """
    if device.type == "cuda" and not (
        dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    ):
        listed = listed_gpu_peak(torch.cuda.get_device_name(device), dtype)
        if listed is not None:
            return listed
    return measured_peak(device.type, dtype, torch.get_num_threads())
