"""Which runner fits a model, its device and the settings."""

from __future__ import annotations

import copy
import threading

import torch

from mtnlg.config import ConfigError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.draws import load_kernels
from mtnlg.generation.encoder_decoder_runner import EncoderDecoderRunner
from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.int8_pages import int8_element_bytes
from mtnlg.generation.memory import num_cache_pages
from mtnlg.generation.prepared import can_prepare
from mtnlg.generation.runner import PAGE_SIZE, PlainRunner, Runner
from mtnlg.model import LanguageModel, MegatronEncoderDecoder, MegatronLmDecoder
from mtnlg.model.adapters import adapter_set_aside
from mtnlg.native import is_busy

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PREPARED_DTYPES = (torch.float32, torch.bfloat16)
# Compiling takes a core for some seconds; a smaller model has answered by then.
WORTH_COMPILING = 5_000_000  # parameters


def make_runner(model: LanguageModel, config: EngineConfig) -> Runner:
    """The fast runner where the model consists of the usual parts, or the plain one.

    A model whose weights are elsewhere, on other ranks, brings a ``make_runner`` of its own.

    Args:
        model: the decoder or encoder-decoder; it is not changed.
        config: settings.

    Raises:
        ConfigError: ``cache_gib`` does not hold a page, or this model's cache cannot be int8.
    """
    is_large = model.config.num_parameters >= WORTH_COMPILING
    mode = "off" if config.compile == "auto" and not is_large else config.compile
    runner = _fitting(model, config, mode)
    if mode != "off" and next(model.parameters()).device.type != "cuda":
        if is_busy():  # compiling, on a machine that never did so: numpy chooses the same tokens meanwhile
            threading.Thread(target=load_kernels, name="mtnlg-kernels", daemon=True).start()
        else:
            load_kernels()
    return runner


def _fitting(model: LanguageModel, config: EngineConfig, mode: str) -> Runner:
    make = getattr(model, "make_runner", None)
    is_fast = make is None and isinstance(model, MegatronLmDecoder) and _can_prepare(model)
    if config.cache_dtype == "int8" and not is_fast:
        raise ConfigError(
            "cache_dtype is 'int8': a model over ranks, an encoder-decoder or one with parts that the fast "
            "runner does not know keeps keys and values in its own dtype; use auto."
        )
    if make is not None:
        return make(config)
    parameter = next(model.parameters())
    dtype = DTYPES.get(config.dtype, parameter.dtype)
    if isinstance(model, MegatronEncoderDecoder):
        return _encoder_decoder_runner(model, config, dtype)
    element = int8_element_bytes(model.config) if config.cache_dtype == "int8" else dtype.itemsize
    num_pages = num_cache_pages(model.config, config, PAGE_SIZE, element, parameter.device)
    if dtype in PREPARED_DTYPES and is_fast:
        is_int8 = config.cache_dtype == "int8"
        return FastRunner(model, num_pages, PAGE_SIZE, dtype, config.deterministic, mode, is_int8)
    if dtype != parameter.dtype:
        model = copy.deepcopy(model).to(dtype)
    return PlainRunner(model, num_pages)


def _can_prepare(model: MegatronLmDecoder) -> bool:
    with adapter_set_aside(model):  # mixed in by the runner
        return can_prepare(model)


def _encoder_decoder_runner(
    model: MegatronEncoderDecoder, config: EngineConfig, dtype: torch.dtype
) -> EncoderDecoderRunner:
    parameter = next(model.parameters())
    num_pages = num_cache_pages(model.config, config, PAGE_SIZE, dtype.itemsize, parameter.device)
    if dtype != parameter.dtype:
        model = copy.deepcopy(model).to(dtype)
    return EncoderDecoderRunner(model, num_pages, alone=config.deterministic)
