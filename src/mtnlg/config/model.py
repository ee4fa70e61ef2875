"""The architecture: one config class for the GPT-2/GPT-3/MT-NLG and the Llama/Qwen-like families."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mtnlg.config.attention_rules import attention_problems, reach
from mtnlg.config.encoder_decoder import encoder_decoder_problems
from mtnlg.config.errors import ConfigError
from mtnlg.config.model_rules import GATED_ACTIVATIONS, choice_problems, range_problems, shape_problems
from mtnlg.config.model_sizes import count_layer, count_parameters
from mtnlg.config.moe import AUX_LOSS_COEFFICIENT, BIAS_UPDATE_RATE, expert_problems
from mtnlg.config.prompt_tuning import prompt_tuning_problems
from mtnlg.config.quantize import quantize_problems


@dataclass
class MegatronModelConfig:
    """Architecture of an autoregressive Transformer decoder, or of an encoder-decoder.

    The defaults are GPT-2's. ``None`` always means "derive it", and the derived value is what the
    properties named after each field return.

    Args:
        vocab_size: rows of the token embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of Transformer layers; an encoder-decoder's are the encoder's.
        num_attention_heads: query heads of each layer.
        intermediate_size: width of the MLP; ``None`` is ``4 * hidden_size``.
        max_position_embeddings: longest sequence (tokens); learned positions have this many rows.
        use_cache: keep keys and values while generating.
        layernorm_eps: epsilon of every normalization.
        init_method_std: standard deviation of the normal initialisation; ``None`` is MT-NLG's
            ``sqrt(1 / (3 * hidden_size))``.
        output_layer_init_method: initialisation of the two projections that write into the residual
            stream. ``None`` or ``"scaled_normal"`` is Megatron's ``std / sqrt(2 * layers)``;
            ``"normal"`` uses ``init_method_std``; ``"zeros"`` starts every layer as the identity.
        parallel_output: under tensor parallelism keep the logits split over the vocabulary and
            compute the loss on the shards; ``False`` gathers them first.
        activation_function: one of gelu, gelu_tanh, relu, squared_relu, silu, and the gated swiglu,
            geglu, geglu_tanh, reglu.
        pre_process_first: when layers are divided over pipeline stages, count the embedding as work
            of the first stage, which then gets fewer layers.
        post_process_last: likewise the head and the loss, for the last stage.
        quantize: keep the matrices of the linear layers in few bits, for inference; trained from the
            start or further, the run learns under that rounding (quantization-aware training).
        quantize_config: in which, the fields of :class:`~mtnlg.config.quantize.QuantizeConfig`; ``None``
            is int8 with a scale for each row.
        enable_input_require_grads: the embedding's output requires gradients, which adapters need
            under activation recomputation.
        prompt_tuning: virtual tokens stand with every text, and training changes nothing but them
            (Lester et al. 2021, arXiv 2104.08691). The options below say nothing without it.
        prompt_tuning_num_tokens: how many; ``None`` is 20.
        prompt_tuning_init_text: text whose embeddings they begin as, repeated or cut to their number;
            ``None`` or empty draws tokens at random.
        prompt_tuning_update_every_n_steps: their gradients are averaged over so many steps before they
            change; ``None`` is 1.
        prompt_tuning_lr_multiplier: of the learning rate, for them; ``None`` is 1.
        prompt_tuning_max_seq_length: most tokens, virtual ones among them, of a text that is trained on
            or written; ``None`` is ``max_position_embeddings``.
        prompt_tuning_vocab_size: tokens are drawn from so many first ones of the vocabulary (frequent
            ones come first); ``None`` is all of it.
        prompt_tuning_prompt_style: where virtual tokens stand: ``prepend`` (before everything; ``None``),
            ``append`` (between prompt and answer) or ``both`` (half of them at each).
        prompt_tuning_prompt_style_args: text put around the user's: ``{"prefix": ..., "suffix": ...}``.
        prompt_tuning_prompt_style_args_type: how keys and values below are read: ``dict`` (``None``), each
            value under its key; ``list``, values alone, prefix first.
        prompt_tuning_prompt_style_args_keys: names of the values that follow.
        prompt_tuning_prompt_style_args_values: the texts; they win over those of
            ``prompt_tuning_prompt_style_args``.
        num_key_value_heads: heads of keys and values (grouped-query attention); ``None`` is one for
            each query head.
        head_dim: size of one head; ``None`` is ``hidden_size / num_attention_heads``.
        position_embedding: ``learned`` absolute, ``rotary``, ``alibi`` (a bias on the scores that grows
            with distance, arXiv 2108.12409), or ``none``.
        position_offset: learned positions begin at this row (OPT's at 2).
        rotary_base: base of the rotary frequencies (theta).
        rotary_percent: share of each head's dimensions that is rotated, in (0, 1].
        rotary_scaling: how the frequencies are stretched for longer texts than those learned from:
            ``rope_type`` (linear, dynamic, yarn, llama3 or longrope) and its numbers, under the names of
            Hugging Face's ``rope_parameters``; ``None`` leaves them as they are.
        rotary_local_base: base of layers with a window, whose frequencies are not scaled (Gemma 3);
            ``None`` is that of all.
        normalization: ``layernorm``, ``rmsnorm``, or ``rmsnorm_1p``, whose weights are stored less one
            (Gemma).
        norm_placement: ``before`` each sub-block (pre-LN), ``after`` its sum with the residual stream
            (post-LN, without a last norm), or ``around`` it: before it and on its output (Gemma 2).
        parallel_residual: attention and MLP read the same residual stream and are added to it together
            (GPT-NeoX).
        embedding_norm: a norm on the embeddings (BLOOM).
        embedding_scale: what token embeddings are multiplied by; ``None`` is 1.
        embedding_size: width of the token embedding and the head, with a projection to and from
            ``hidden_size`` where they differ (OPT-350M); ``None`` is ``hidden_size``.
        tie_word_embeddings: the head shares the token embedding's matrix.
        logit_softcap: logits are squeezed smoothly to between plus and minus this (Gemma 2).
        attention_softcap: likewise the scores of attention.
        attention_scalar: scores are divided by its square root; ``None`` is the size of a head.
        sliding_window: tokens that attention sees, its own included; ``None`` is all before it.
        full_attention_layers: numbers of layers that see everything all the same; ``None`` is no layer.
        attention_bias: biases on the query, key and value projections.
        attention_output_bias: bias on the attention's output projection; ``None`` follows
            ``attention_bias`` (Qwen2 has the former without the latter).
        mlp_bias: biases in the MLP.
        qk_normalization: RMSNorm over each head's queries and keys (Qwen3).
        hidden_dropout: dropout after the embedding and on each sub-block's output.
        attention_dropout: dropout on the attention weights.
        exported_as: Hugging Face's ``model_type`` that is written where several compute the same; that of
            the files it was read from. ``None`` is the first of them.
        architecture: ``decoder``, or ``encoder_decoder`` (T5's kind, with relative positions).
        num_decoder_layers: layers of an encoder-decoder's decoder; ``None`` is as many as the encoder's.
        relative_attention_num_buckets: of distances that are told apart (``relative`` positions).
        relative_attention_max_distance: tokens from which on all distances are alike.
        relative_attention_per_layer: each layer has its own numbers for them (UMT5).
        scale_output: divide what the head reads by ``sqrt(hidden_size)``; ``None`` does so where the head
            is tied (T5 v1.0), otherwise not (v1.1).
        decoder_start_token_id: what an encoder-decoder's decoder starts with.
        pad_token_id: fills shorter rows; what the decoder reads where a label is ignored.
        eos_token_id: ends what an encoder-decoder writes.
        num_experts: experts of each layer that has them (mixture of experts); ``None`` is a dense model.
        num_experts_per_token: experts that each token is sent to.
        moe_intermediate_size: width of one expert; ``None`` is that of the MLP.
        num_shared_experts: experts that every token goes through as well (DeepSeekMoE).
        shared_expert_intermediate_size: width of all shared experts together; ``None`` is that many times
            an expert's.
        shared_expert_gate: what the shared experts give is weighted by a sigmoid of the token (Qwen2-MoE).
        num_dense_layers_first: layers at the beginning without experts.
        moe_layer_interval: of the others, every so many-th has experts (layer ``i`` where
            ``(i + 1) % interval`` is 0).
        router_score_function: ``softmax`` over all experts, or ``sigmoid`` of each by itself.
        normalize_router_weights: divide the weights of a token's experts by their sum.
        router_scaling_factor: what the weights are multiplied by after that.
        router_load_balancing: how experts are kept equally busy: an ``auxiliary_loss`` for each
            sequence (Switch, DeepSeek-V3), a ``bias`` on the choice that follows the load (arXiv
            2408.15664), or ``none``.
        router_aux_loss_coefficient: weight of that loss; ``None`` is 0.01 with ``auxiliary_loss`` and
            0 with ``bias``, where a small one may be given as well.
        router_z_loss_coefficient: weight of the squared log-sum-exp of the router's logits (ST-MoE,
            arXiv 2202.08906).
        router_bias_update_rate: what the bias moves by in one step; ``None`` is 0.001.

    Raises:
        ConfigError: naming every field that is out of range, all at once.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    use_cache: bool = True
    layernorm_eps: float = 1e-5
    init_method_std: float | None = 0.02
    output_layer_init_method: str | None = None
    parallel_output: bool = True
    activation_function: str = "gelu"
    pre_process_first: bool = True
    post_process_last: bool = True
    quantize: bool = False
    quantize_config: dict[str, Any] | None = None
    enable_input_require_grads: bool = False
    prompt_tuning: bool = False
    prompt_tuning_num_tokens: int | None = None
    prompt_tuning_init_text: str | None = None
    prompt_tuning_update_every_n_steps: int | None = None
    prompt_tuning_lr_multiplier: float | None = None
    prompt_tuning_max_seq_length: int | None = None
    prompt_tuning_vocab_size: int | None = None
    prompt_tuning_prompt_style: str | None = None
    prompt_tuning_prompt_style_args: dict[str, Any] | None = None
    prompt_tuning_prompt_style_args_type: str | None = None
    prompt_tuning_prompt_style_args_keys: list[str] | None = None
    prompt_tuning_prompt_style_args_values: list[str] | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    position_embedding: str = "learned"
    position_offset: int = 0
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rotary_scaling: dict[str, Any] | None = None
    rotary_local_base: float | None = None
    normalization: str = "layernorm"
    norm_placement: str = "before"
    parallel_residual: bool = False
    embedding_norm: bool = False
    embedding_scale: float | None = None
    embedding_size: int | None = None
    tie_word_embeddings: bool = True
    logit_softcap: float | None = None
    attention_softcap: float | None = None
    attention_scalar: float | None = None
    sliding_window: int | None = None
    full_attention_layers: list[int] | None = None
    attention_bias: bool = True
    attention_output_bias: bool | None = None
    mlp_bias: bool = True
    qk_normalization: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    exported_as: str | None = None
    architecture: str = "decoder"
    num_decoder_layers: int | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_per_layer: bool = False
    scale_output: bool | None = None
    decoder_start_token_id: int = 0
    pad_token_id: int = 0
    eos_token_id: int = 1
    num_experts: int | None = None
    num_experts_per_token: int = 2
    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    num_dense_layers_first: int = 0
    moe_layer_interval: int = 1
    router_score_function: str = "softmax"
    normalize_router_weights: bool = True
    router_scaling_factor: float = 1.0
    router_load_balancing: str = "auxiliary_loss"
    router_aux_loss_coefficient: float | None = None
    router_z_loss_coefficient: float = 0.0
    router_bias_update_rate: float | None = None

    def __post_init__(self) -> None:
        problems = range_problems(self) + choice_problems(self)
        if not problems:
            problems = shape_problems(self) + attention_problems(self) + expert_problems(self)
            problems += encoder_decoder_problems(self)
            problems += quantize_problems(self.quantize, self.quantize_config)
            problems += prompt_tuning_problems(self)
        if problems:
            raise ConfigError(problems)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> MegatronModelConfig:
        """The named preset with some fields replaced.

        Raises:
            ConfigError: the preset does not exist (the message suggests the nearest names).
        """
        from mtnlg.config.presets import preset_fields

        return cls(**{**preset_fields(name), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, as saved in ``config.yaml`` and ``config.json``."""
        return asdict(self)

    @property
    def ffn_size(self) -> int:
        """Width of the MLP, derived if need be."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values, derived if need be."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Dimensions of one head, derived if need be."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads what a decoder answers."""
        return self.architecture == "encoder_decoder"

    @property
    def decoder_layers(self) -> int:
        """Layers of an encoder-decoder's decoder, derived if need be; 0 where there is no encoder."""
        if self.architecture == "decoder":
            return 0
        return self.num_decoder_layers or self.num_hidden_layers

    @property
    def total_layers(self) -> int:
        """All Transformer layers: an encoder-decoder's encoder's first, then its decoder's."""
        return self.num_hidden_layers + self.decoder_layers

    @property
    def scales_output(self) -> bool:
        """Whether an encoder-decoder's head reads scaled states, derived if need be."""
        return self.tie_word_embeddings if self.scale_output is None else self.scale_output

    @property
    def rotary_dim(self) -> int:
        """Dimensions of one head that rotary positions turn (even)."""
        return int(self.head_size * self.rotary_percent) // 2 * 2

    @property
    def embedding_width(self) -> int:
        """Width of the token embedding and of the head, derived if need be."""
        return self.embedding_size or self.hidden_size

    def window_of_layer(self, index: int) -> int | None:
        """Tokens that attention of one layer sees; ``None`` is all."""
        has_none = self.full_attention_layers is not None and index in self.full_attention_layers
        return None if has_none else self.sliding_window

    @property
    def max_cached_length(self) -> int:
        """Longest text (tokens) in which earlier keys stay right while it grows.

        Some ways to scale rotary frequencies turn all tokens of a text differently as soon as it is longer
        than those learned from; keys that were cached before do not fit any more.
        """
        return reach(self)

    @property
    def shared_expert_size(self) -> int:
        """Width of all shared experts together, derived if need be."""
        return self.shared_expert_intermediate_size or self.num_shared_experts * self.expert_ffn_size

    @property
    def init_std(self) -> float:
        """Standard deviation of the initialisation, derived if need be (MT-NLG, section 3.2)."""
        return self.init_method_std or math.sqrt(1.0 / (3.0 * self.hidden_size))

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        if self.attention_output_bias is None:
            return self.attention_bias
        return self.attention_output_bias

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate (three matrices instead of two)."""
        return self.activation_function in GATED_ACTIVATIONS

    @property
    def expert_ffn_size(self) -> int:
        """Width of one expert, derived if need be."""
        return self.moe_intermediate_size or self.ffn_size

    @property
    def aux_loss_coefficient(self) -> float:
        """Weight of the load-balancing loss, derived if need be."""
        if self.router_aux_loss_coefficient is None:
            return AUX_LOSS_COEFFICIENT * (self.router_load_balancing == "auxiliary_loss")
        return self.router_aux_loss_coefficient

    @property
    def bias_update_rate(self) -> float:
        """What the router's bias moves by in one step, derived if need be."""
        return BIAS_UPDATE_RATE if self.router_bias_update_rate is None else self.router_bias_update_rate

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, by formula; the tied head counts once."""
        return count_parameters(self)

    @property
    def num_active_parameters(self) -> int:
        """Those that one token goes through: of the experts only as many as it is sent to."""
        return count_parameters(self, active=True)

    @property
    def num_parameters_per_layer(self) -> int:
        """Trainable parameters of the last Transformer layer; in a dense model all have as many."""
        return count_layer(self, self.total_layers - 1)

    def num_parameters_of_layer(self, index: int) -> int:
        """Trainable parameters of one Transformer layer, by formula."""
        return count_layer(self, index)

    def num_active_parameters_of_layer(self, index: int) -> int:
        """Those of one layer that one token goes through."""
        return count_layer(self, index, active=True)
