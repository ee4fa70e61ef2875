"""One Transformer layer: where its norms stand and how its two sub-blocks are added."""

from __future__ import annotations

from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig
from mtnlg.config.moe import has_experts
from mtnlg.model.attention import Attention, KeyValueCache
from mtnlg.model.mlp import Mlp
from mtnlg.model.moe import MixtureOfExperts
from mtnlg.model.norms import make_norm
from mtnlg.model.positions import Rotation


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), whose MLP may be a mixture of experts."""

    def __init__(self, config: MegatronModelConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer_index)
        self.mlp_norm = make_norm(config)
        self.mlp = MixtureOfExperts(config) if has_experts(config, layer_index) else Mlp(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden] → [batch, sequence, hidden]"""
        attended = self.attention(self.attention_norm(hidden), rotation, mask, cache)
        hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))

    @property
    def attentions(self) -> list[Attention]:
        """Every attention of the layer."""
        return [self.attention]

    @property
    def stream_norms(self) -> list[nn.Module]:
        """The norms that work on the residual stream, or on what is added to it."""
        return [self.attention_norm, self.mlp_norm]


class ParallelLayer(DecoderLayer):
    """x + attention(norm(x)) + mlp(norm'(x)) (GPT-J; GPT-NeoX, Black et al. 2022, arXiv 2204.06745)."""

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden] → [batch, sequence, hidden]"""
        attended = self.attention(self.attention_norm(hidden), rotation, mask, cache)
        computed = self.mlp(self.mlp_norm(hidden))
        return hidden + self.dropout(attended) + self.dropout(computed)


class PostNormLayer(DecoderLayer):
    """norm(x + attention(x)), then norm(x + mlp(x)) (Vaswani et al. 2017; OPT-350M)."""

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden] → [batch, sequence, hidden]"""
        attended = self.attention(hidden, rotation, mask, cache)
        hidden = self.attention_norm(hidden + self.dropout(attended))
        return self.mlp_norm(hidden + self.dropout(self.mlp(hidden)))


class SandwichLayer(DecoderLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))) (CogView, arXiv 2105.13290; Gemma 2)."""

    def __init__(self, config: MegatronModelConfig, layer_index: int) -> None:
        super().__init__(config, layer_index)
        self.attention_output_norm = make_norm(config)
        self.mlp_output_norm = make_norm(config)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden] → [batch, sequence, hidden]"""
        attended = self.attention(self.attention_norm(hidden), rotation, mask, cache)
        hidden = hidden + self.dropout(self.attention_output_norm(attended))
        computed = self.mlp(self.mlp_norm(hidden))
        return hidden + self.dropout(self.mlp_output_norm(computed))

    @property
    def stream_norms(self) -> list[nn.Module]:
        """The norms that work on the residual stream, or on what is added to it."""
        return [self.attention_norm, self.attention_output_norm, self.mlp_norm, self.mlp_output_norm]


def make_layer(config: MegatronModelConfig, layer_index: int) -> DecoderLayer:
    """Layer ``layer_index`` of ``config``."""
    if config.parallel_residual:
        return ParallelLayer(config, layer_index)
    kinds = {"before": DecoderLayer, "after": PostNormLayer, "around": SandwichLayer}
    return kinds[config.norm_placement](config, layer_index)
