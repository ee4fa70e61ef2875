"""Folders as GPTQ's, AWQ's and float8's programs write them, packed here number by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tests.interop.test_hugging_face import random_model

from mtnlg.interop import write_hugging_face

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight each part of a word holds


def packed_along(numbers: np.ndarray, bits: int, order=None) -> torch.Tensor:
    """[rows, columns] unsigned → [rows, columns · bits / 32] int32, the first in the lowest bits."""
    per_word = 32 // bits
    order = order or range(per_word)
    words = np.zeros((numbers.shape[0], numbers.shape[1] // per_word), dtype=np.uint32)
    for word in range(words.shape[1]):
        for place, which in enumerate(order):
            part = numbers[:, word * per_word + which].astype(np.uint32)
            words[:, word] |= part << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32).copy())


def gptq(name: str, shape: tuple[int, int], said: dict[str, Any], draw) -> tuple[dict, np.ndarray]:
    """Tensors of a matrix [out, in], and its numbers in float64."""
    bits, size = said["bits"], said["group_size"] if said["group_size"] > 0 else shape[1]
    groups = np.arange(shape[1]) // size
    if said["desc_act"]:
        draw.shuffle(groups)
    codes = draw.integers(0, 2**bits, shape[::-1])  # [in, out]
    zeros = draw.integers(0, 2**bits, (groups.max() + 1, shape[0]))
    if said["sym"]:
        zeros[:] = 2 ** (bits - 1)
    scales = (draw.random(zeros.shape) * 0.02 + 0.001).astype(np.float16)
    stored = zeros if said.get("checkpoint_format") == "gptq_v2" else (zeros - 1) % 2**bits
    tensors = {
        "qweight": packed_along(codes.T, bits).t(),
        "qzeros": packed_along(stored, bits),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    whole = scales.astype(np.float64)[groups] * (codes - zeros[groups])
    return tensors, whole.T


def awq(name: str, shape: tuple[int, int], said: dict[str, Any], draw) -> tuple[dict, np.ndarray]:
    """As :func:`gptq`."""
    size = said["group_size"] if said["group_size"] > 0 else shape[1]
    groups = np.arange(shape[1]) // size
    codes = draw.integers(0, 16, shape[::-1])
    zeros = draw.integers(0, 16, (groups.max() + 1, shape[0]))
    scales = (draw.random(zeros.shape) * 0.02 + 0.001).astype(np.float16)
    tensors = {
        "qweight": packed_along(codes, 4, AWQ_ORDER),
        "qzeros": packed_along(zeros, 4, AWQ_ORDER),
        "scales": torch.from_numpy(scales),
    }
    return tensors, (scales.astype(np.float64)[groups] * (codes - zeros[groups])).T


def fp8(name: str, shape: tuple[int, int], said: dict[str, Any], draw) -> tuple[dict, np.ndarray]:
    """As :func:`gptq`; scales are those of blocks, or one."""
    weight = torch.from_numpy(draw.standard_normal(shape)).to(torch.float8_e4m3fn)
    blocks = said.get("weight_block_size")
    if not blocks:
        scale = torch.tensor(float(draw.random()) * 0.1 + 0.01)
        tensors = {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(1.0)}
        return tensors, weight.double().numpy() * scale.double().numpy()
    counts = tuple(-(-length // block) for length, block in zip(shape, blocks))
    scales = torch.from_numpy(draw.random(counts) * 0.1 + 0.01).float()
    whole = scales.double().numpy().repeat(blocks[0], 0).repeat(blocks[1], 1)[: shape[0], : shape[1]]
    return {"weight": weight, "weight_scale_inv": scales}, weight.double().numpy() * whole


PACKERS = {"gptq": gptq, "awq": awq, "fp8": fp8}


def packed_folder(folder: Path, said: dict[str, Any], left: tuple[str, ...] = (), **fields: Any):
    """A random model whose layers' matrices are packed as ``said``.

    Args:
        folder: of the files.
        said: ``quantization_config``.
        left: parts of names of matrices that stay in floating point.
        fields: of the model.

    Returns:
        The same model in floating point, and its matrices in float64 by their names in the files.
    """
    model, draw = random_model(**fields), np.random.default_rng(3)
    write_hugging_face(model, folder)
    path, tensors, found = folder / "model.safetensors", {}, {}
    transposed = json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    for name, tensor in load_file(path).items():
        is_matrix = tensor.dim() == 2 and (".layers." in name or ".h." in name)
        if not is_matrix or any(part in name for part in left):
            tensors[name] = tensor
            continue
        shape = tuple(tensor.shape[::-1] if transposed else tensor.shape)
        parts, whole = PACKERS[said["quant_method"]](name, shape, said, draw)
        found[name] = torch.from_numpy(whole.T if transposed else whole)
        base = name.removesuffix("weight")
        tensors |= {f"{base}{part}": one.contiguous() for part, one in parts.items()}
    save_plain(folder, load_file(path) | {name: one.float() for name, one in found.items()})
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(quantization_config=said)))
    return folder / "plain", found


def save_plain(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The model in floating point, beside."""
    plain = folder / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, plain / "model.safetensors")
