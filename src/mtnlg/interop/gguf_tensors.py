"""What llama.cpp calls our parameters, and how its tensors differ from them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.interop.gguf_families import GgufFamily, gguf_family
from mtnlg.model import MegatronEncoderDecoder, MegatronLmDecoder, NoInitialization
from mtnlg.model.rotary_scaling import plain_frequencies, rotary_frequencies

ROTARY_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ALL_FACTORS = (ROTARY_FACTORS, LONG_FACTORS, SHORT_FACTORS)
HEAD, EMBEDDING = "head.output.weight", "embedding.tokens.weight"
_ENDS = {
    "embedding.tokens": "token_embd",
    "embedding.positions": "position_embd",
    "embedding.norm": "token_embd_norm",
    "head.norm": "output_norm",
    "head.output": "output",
}
_PARTS = {
    "attention_norm": "attn_norm",
    "attention_output_norm": "post_attention_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp_output_norm": "post_ffw_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate": "ffn_gate_exps",
    "mlp.experts.up": "ffn_up_exps",
    "mlp.experts.down": "ffn_down_exps",
    "mlp.shared.gate": "ffn_gate_shexp",
    "mlp.shared.up": "ffn_up_shexp",
    "mlp.shared.down": "ffn_down_shexp",
    "mlp.shared_gate": "ffn_gate_inp_shexp",
}
_T5_ENDS = _ENDS | {
    "encoder_positions.buckets": "enc.blk.0.attn_rel_b",
    "decoder_positions.buckets": "dec.blk.0.attn_rel_b",
    "encoder_end.norm": "enc.output_norm",
    "head.norm": "dec.output_norm",
}
_T5_PARTS = _PARTS | {
    "attention.output": "attn_o",
    "positions.buckets": "attn_rel_b",
    "cross_norm": "cross_attn_norm",
    "cross_attention.query": "cross_attn_q",
    "cross_attention.key": "cross_attn_k",
    "cross_attention.value": "cross_attn_v",
    "cross_attention.output": "cross_attn_o",
}
_PLACE = re.compile(r"(?:layers\.(?P<layer>\d+)\.)?(?P<part>.+?)(?:\.(?P<kind>weight|bias))?")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Args:
        name: llama.cpp's.
        ours: our parameters, which it holds one after the other along the output axis; none where the
            numbers follow from the config.
        shape: of it, outermost axis first.
        sizes: rows of each of ours.
        heads: rows are to be reordered within so many heads; ``None`` leaves them.
        factor: ours are multiplied by it,
        added: and it is added to them.
        shape_of_ours: where that is another one.
    """

    name: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    heads: int | None = None
    factor: float = 1.0
    added: float = 0.0
    shape_of_ours: tuple[int, ...] | None = None

    @property
    def may_round(self) -> bool:
        """Whether the way to the file and back may change the last bit."""
        return self.factor != 1.0 or self.added != 0.0

    def to_theirs(self, ours: list[Tensor]) -> Tensor:
        """Ours → theirs, float32."""
        whole = (torch.cat(ours) if len(ours) > 1 else ours[0]).detach().float()
        if self.may_round:
            whole = whole * self.factor + self.added
        if self.heads is not None:
            halves = whole.unflatten(0, (self.heads, 2, -1))  # [heads, half, pair, ...]
            whole = halves.transpose(1, 2).flatten(0, 2)
        return whole.reshape(self.shape).contiguous()

    def to_ours(self, whole: Tensor) -> dict[str, Tensor]:
        """Theirs → ours, as views but where they are computed with."""
        if self.may_round:
            whole = (whole - self.added) / self.factor
        if self.heads is not None:
            pairs = whole.unflatten(0, (self.heads, -1, 2))  # [heads, pair, half, ...]
            whole = pairs.transpose(1, 2).flatten(0, 2)
        if self.shape_of_ours is not None:
            whole = whole.view(self.shape_of_ours)
        parts = whole.split(self.sizes) if len(self.ours) > 1 else [whole]
        return dict(zip(self.ours, parts))


def gguf_tensors(config: MegatronModelConfig) -> list[GgufTensor]:
    """All tensors of a file, in the order of the model.

    Raises:
        ConfigError: llama.cpp has nothing that computes this model.
    """
    family = gguf_family(config)
    shapes = _shapes(config)
    if config.tie_word_embeddings:
        del shapes[HEAD]
    found = _rotary_tensors(config)
    for ours in shapes:
        names = _joined(family, ours)
        if names is None:
            continue
        sizes = tuple(shapes[name][0] for name in names)
        shape = (sum(sizes), *shapes[ours][1:])
        name = gguf_name(ours, config)
        if len(names) == 3:
            name = name.replace("attn_q", "attn_qkv")
        elif len(names) == 2:
            name = name.replace("ffn_gate", "ffn_up")
        flat = shape[1:] if ours.endswith("shared_gate.weight") else None
        found.append(
            GgufTensor(
                name,
                names,
                flat or shape,
                sizes,
                _heads(family, config, ours),
                _factor(config, ours),
                1.0 if family.norm_less_one and "norm." in ours else 0.0,
                shape if flat else None,
            )
        )
    if family.needs_head and config.tie_word_embeddings:
        found.append(GgufTensor("output.weight", (EMBEDDING,), shapes[EMBEDDING], shapes[EMBEDDING][:1]))
    return found


def _shapes(config: MegatronModelConfig) -> dict[str, tuple[int, ...]]:
    kind = MegatronEncoderDecoder if config.has_encoder else MegatronLmDecoder
    with torch.device("meta"), NoInitialization():
        state = kind(config).state_dict()
    return {name: tuple(parameter.shape) for name, parameter in state.items()}


def _rotary_tensors(config: MegatronModelConfig) -> list[GgufTensor]:
    kind = (config.rotary_scaling or {}).get("rope_type")
    names = {"llama3": (ROTARY_FACTORS,), "longrope": (LONG_FACTORS, SHORT_FACTORS)}.get(str(kind), ())
    return [GgufTensor(name, (), (config.rotary_dim // 2,)) for name in names]


def rotary_factors(config: MegatronModelConfig, name: str) -> Tensor:
    """What llama.cpp divides the frequency of each pair by, float32: the tensor called ``name``."""
    scaling = config.rotary_scaling or {}
    if name != ROTARY_FACTORS:
        return torch.tensor(scaling["long_factor" if name == LONG_FACTORS else "short_factor"])
    scaled, _ = rotary_frequencies(config, torch.zeros(1, 1, dtype=torch.long))
    plain = plain_frequencies(config.rotary_base, config.rotary_dim, torch.device("cpu"))
    return (plain / scaled).flatten()


def _joined(family: GgufFamily, ours: str) -> tuple[str, ...] | None:
    """Our parameters in the tensor that begins with ``ours``; ``None`` where it is in another's."""
    if family.joins_queries and re.search(r"\.attention\.(query|key|value)\.", ours):
        if ".attention.query." not in ours:
            return None
        return tuple(ours.replace("query", part) for part in ("query", "key", "value"))
    if family.joins_gate and re.search(r"\.mlp\.(gate|up)\.", ours):
        return (ours, ours.replace("gate", "up")) if ".gate." in ours else None
    return (ours,)


def gguf_name(ours: str, config: MegatronModelConfig) -> str:
    """llama.cpp's name of a parameter of ours."""
    match = _PLACE.fullmatch(ours)
    assert match is not None
    kind = match["kind"] or "weight"
    ends, parts = (_T5_ENDS, _T5_PARTS) if config.has_encoder else (_ENDS, _PARTS)
    if match["layer"] is None:
        return f"{ends[match['part']]}.{kind}"
    block = f"blk.{match['layer']}"
    if config.has_encoder:
        layer = int(match["layer"])
        before = config.num_hidden_layers
        block = f"enc.blk.{layer}" if layer < before else f"dec.blk.{layer - before}"
    if ours.endswith("router.selection_bias"):
        return f"{block}.exp_probs_b.bias"
    part = parts[match["part"]]
    if part == "ffn_norm" and gguf_family(config).name == "glm4moe":
        part = "post_attention_norm"
    return f"{block}.{part}.{kind}"


def _heads(family: GgufFamily, config: MegatronModelConfig, ours: str) -> int | None:
    if not family.turns_pairs:
        return None
    if ".attention.query." in ours:
        return config.num_attention_heads
    return config.key_value_heads if ".attention.key." in ours else None


def _factor(config: MegatronModelConfig, ours: str) -> float:
    """What the head reads is scaled in some T5; llama.cpp has no such factor, so the norm takes it."""
    scales = config.has_encoder and config.scales_output and ours == "head.norm.weight"
    return config.hidden_size**-0.5 if scales else 1.0
