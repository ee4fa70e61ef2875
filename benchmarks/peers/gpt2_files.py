"""GPT-2 (124M) with random weights as files that everybody loads: a Hugging Face folder and GGUF.

The tokenizer is made and not learned: 256 bytes, then every two and three small letters, then as many
words of four as make 50,257 tokens with the end of text. ``prompt`` gives text of an exact number of
tokens, and almost every token is text by itself, so that a server sends something for each.

    python -m benchmarks.peers.gpt2_files FOLDER     # FOLDER/hf, FOLDER/gpt2-float32.gguf, ...
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCAB, POSITIONS, WIDTH, LAYERS, HEADS = 50257, 1024, 768, 12, 12
END = "<|endoftext|>"
GGUF_TYPES = {"float32": "F32", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def write_hf(folder: Path, seed: int = 0, layers: int = LAYERS) -> Path:
    """The model as a Hugging Face folder in float32; written anew only where it is not there."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = vocabulary()
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(tokens, merges)))
    named: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    named |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS}
    named |= {"chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text(json.dumps(_config(layers)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": VOCAB - 1}))
    partial = folder / "model.writing"
    save_file(_weights(seed, layers), partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")
    return folder


def write_gguf(path: Path, dtype: str, hf: Path) -> Path:
    """The folder ``hf`` as GGUF in one of :data:`GGUF_TYPES`; norms, biases, positions stay float32."""
    if path.is_file():
        return path
    import gguf

    config = json.loads((hf / "config.json").read_text())
    partial = path.with_suffix(".writing")
    writer = gguf.GGUFWriter(partial, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{GGUF_TYPES[dtype]}".replace("MOSTLY_F32", "ALL_F32")])
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCAB - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(VOCAB - 1)
    writer.add_eos_token_id(VOCAB - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    kind = gguf.GGMLQuantizationType[GGUF_TYPES[dtype]]
    for name, tensor in _gguf_tensors(load_file(hf / "model.safetensors")):
        if tensor.dim() == 1 or name == "position_embd.weight":
            writer.add_tensor(name, tensor.numpy())
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def prompt(num_tokens: int, seed: int) -> str:
    """Text of exactly so many tokens (of this tokenizer), different for every seed."""
    rng = random.Random(seed)
    # Letters in ascending order: the first two are then merged first, and the third to them.
    words = ["".join(sorted(rng.sample(ascii_lowercase, 3))) for _ in range(num_tokens // 2)]
    return "." * (num_tokens % 2) + "".join(f" {word}" for word in words)


def vocabulary() -> tuple[list[str], list[str]]:
    """The tokens in the order of their ids, and the merges."""
    letters = list(ascii_lowercase)
    twos = [f"{a}{b}" for a, b in product(letters, letters)]
    merges = [f"{two[0]} {two[1]}" for two in twos]
    merges += [f"{two} {letter}" for two, letter in product(twos, letters)]
    room = VOCAB - 1 - 256 - len(merges)
    merges += islice((f"{one} {two}" for one, two in product(twos, twos)), room)
    tokens = [*_byte_letters(), *(merge.replace(" ", "") for merge in merges)]
    return [*tokens, END], merges


def _byte_letters() -> list[str]:
    """The letters by which byte-level BPE writes the bytes 0-255."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _tokenizer(tokens: list[str], merges: list[str]) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": VOCAB - 1, "content": END, "special": True, "single_word": False}
    end |= {"lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_ctx": POSITIONS,
        "n_embd": WIDTH,
        "n_layer": layers,
        "n_head": HEADS,
        "n_inner": 4 * WIDTH,
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": VOCAB - 1,
        "eos_token_id": VOCAB - 1,
        "torch_dtype": "float32",
    }


def _weights(seed: int, layers: int) -> dict[str, Tensor]:
    """GPT-2's first weights: normal, and zero biases."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        return torch.empty(*shape).normal_(0.0, std, generator=generator)

    found = {
        "transformer.wte.weight": normal(VOCAB, WIDTH),
        "transformer.wpe.weight": normal(POSITIONS, WIDTH),
    }
    matrices = {
        "attn.c_attn": (WIDTH, 3 * WIDTH),
        "attn.c_proj": (WIDTH, WIDTH),
        "mlp.c_fc": (WIDTH, 4 * WIDTH),
        "mlp.c_proj": (4 * WIDTH, WIDTH),
    }
    norms = ["transformer.ln_f"]
    for layer in range(layers):
        prefix = f"transformer.h.{layer}."
        norms += [f"{prefix}ln_1", f"{prefix}ln_2"]
        for name, shape in matrices.items():
            std = 0.02 / (2 * layers) ** 0.5 if name.endswith("c_proj") else 0.02
            found[f"{prefix}{name}.weight"] = normal(*shape, std=std)
            found[f"{prefix}{name}.bias"] = torch.zeros(shape[1])
    for name in norms:
        found[f"{name}.weight"], found[f"{name}.bias"] = torch.ones(WIDTH), torch.zeros(WIDTH)
    return found


def _gguf_tensors(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and [out, in] matrices as llama.cpp has them; the head is the embedding."""
    names = {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
    }
    parts = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    parts |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for name, tensor in weights.items():
        stem, kind = name.rsplit(".", 1)
        if stem in names:
            yield f"{names[stem]}.{kind}", tensor
            continue
        _, _, layer, part = stem.split(".", 3)
        yield f"blk.{layer}.{parts[part]}.{kind}", tensor.t() if tensor.dim() == 2 else tensor


def main() -> None:
    folder = Path(sys.argv[1])
    hf = write_hf(folder / "hf")
    print(hf)
    for dtype in GGUF_TYPES:
        print(write_gguf(folder / f"gpt2-{dtype}.gguf", dtype, hf))


if __name__ == "__main__":
    main()
