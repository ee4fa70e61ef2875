"""A rank's stage of the model in the form in which generation runs it (:mod:`.prepared`).

Layers are prepared as in one process. Where tensor-parallel ranks share a matrix by its inputs, its
products are summed over the ranks before the bias and the residual stream come to them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mtnlg.generation.linears import Linear, fewest_rows, make_linear
from mtnlg.generation.mixed_adapters import AdapterMixer
from mtnlg.generation.prepared import prepared_head
from mtnlg.generation.prepared_blocks import PreparedExperts, PreparedMlp, PreparedNorm
from mtnlg.generation.prepared_layers import Attend, PreparedLayer, TokenRotations, prepare_layer
from mtnlg.model import DecoderLayer, MegatronLmDecoder
from mtnlg.model.mlp import ACTIVATION_FUNCTIONS
from mtnlg.parallel.inference import local_heads
from mtnlg.parallel.mesh import Mesh


class SumOverRanks:
    """Sums what tensor-parallel ranks have of the same numbers.

    Args:
        mesh: this rank's place.
        in_order: add rank after rank, so that a number's rounding does not depend on where in the
            tensor it stands. Of two ranks it never does.
    """

    def __init__(self, mesh: Mesh, in_order: bool) -> None:
        self.size = mesh.tensor_size
        self.group = mesh.axis("tensor").get_group() if self.size > 1 else None
        self.in_order = in_order and self.size > 2

    def __call__(self, share: Tensor) -> Tensor:
        """The sum, in the memory of ``share`` or its own."""
        if self.group is None:
            return share
        if not self.in_order:
            dist.all_reduce(share, group=self.group)
            return share
        shares = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(shares, share, group=self.group)
        total = shares[0]
        for other in shares[1:]:
            total = total + other
        return total


class SummedLinear:
    """A :class:`~mtnlg.generation.linears.Linear` whose inputs are divided over the ranks.

    ``own`` is this rank's share of it, whose products are summed.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, add_up: SumOverRanks
    ) -> None:
        self.own = make_linear([weight], [None], dtype, ACTIVATION_FUNCTIONS)
        self._bias = None if bias is None else bias.to(dtype)
        self._add_up = add_up
        self.num_bytes = self.own.num_bytes

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """Only ``plus`` is taken: nothing else comes right after such a layer."""
        assert activation is None and times is None
        output = self._add_up(self.own(rows))
        if self._bias is not None:
            output = output + self._bias
        return output if plus is None else output + plus


class SummedExperts(PreparedExperts):
    """A mixture of experts of whose matrices each rank has some columns; all ranks route alike."""

    def __init__(self, experts: PreparedExperts, add_up: SumOverRanks) -> None:
        vars(self).update(vars(experts))
        self._add_up = add_up

    def __call__(self, rows: Tensor, plus: Tensor | None = None) -> Tensor:
        """[rows, hidden] → [rows, hidden]"""
        output = self._add_up(super().__call__(rows))
        return output if plus is None else output + plus


class PreparedStage:
    """What a rank runs of the model.

    Args:
        decoder: the stage, laid out by :func:`~mtnlg.parallel.inference.lay_out_for_inference`. It is
            used up: where weights are packed, its own are given back layer by layer.
        mesh: this rank's place.
        deterministic: sum over ranks in their order.
    """

    def __init__(self, decoder: MegatronLmDecoder, mesh: Mesh, deterministic: bool = False) -> None:
        parameter = next(decoder.parameters())
        self.config, self.device, self.dtype = decoder.config, parameter.device, parameter.dtype
        self.num_heads = local_heads(decoder)
        self.num_queries = self.config.num_attention_heads // mesh.tensor_size // self.num_heads
        self.fewest = fewest_rows(self.device, self.dtype)
        self._add_up = SumOverRanks(mesh, deterministic)
        self.mixer: AdapterMixer | None = None  # put around the matrices when the first adapter comes
        self._embedding = decoder.embedding
        self.look_up: Callable[[Tensor], Tensor] | None = None
        if decoder.embedding is not None:
            self._let_look_up(decoder.embedding.tokens)
        self.layers: dict[int, PreparedLayer] = {}
        for name in list(decoder.layers):
            self.layers[int(name)] = self._prepare(decoder.layers[name])
            del decoder.layers[name]
        head = decoder.head
        self.norm: PreparedNorm | None = None
        self.output: Linear | None = None
        if head is not None:
            self.norm = PreparedNorm(head.norm, self.dtype)
            self.output = prepared_head(self._linear(head.output.weight), head, self.dtype)
            if self._embedding is None:
                decoder.head = None

    @property
    def all_layers(self) -> list[PreparedLayer]:
        """In their order."""
        return list(self.layers.values())

    def _let_look_up(self, tokens: torch.nn.Embedding) -> None:
        """Have the embedding ask :attr:`look_up` for tokens, so that another may take its place."""
        forward = tokens.forward
        self.look_up = lambda ids: forward(ids[None])[0]

        def look_up(ids: Tensor) -> Tensor:
            assert self.look_up is not None
            return self.look_up(ids[0])[None]

        tokens.forward = look_up  # type: ignore[method-assign, assignment]

    def forward(self, inputs: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Through this rank's layers.

        Args:
            inputs: ids [tokens], or hidden states [tokens, hidden] from the stage before.
            positions: [tokens].
            attend: attention of a layer.

        Returns:
            [tokens, hidden]
        """
        hidden = inputs
        if self._embedding is not None:
            hidden = self._embedding(inputs[None], positions[None])[0]
        rotations = TokenRotations(self.config, positions, self.dtype)
        for layer in self.layers.values():
            hidden = layer(hidden, rotations.of_layer(layer), attend)
        return hidden

    def _prepare(self, layer: torch.nn.Module) -> PreparedLayer:
        assert isinstance(layer, DecoderLayer)
        prepared = prepare_layer(layer, self.config.activation_function, self.dtype, self.fewest)
        if self._add_up.group is None:
            return prepared
        prepared.output = self._summed(layer.attention.output)
        if isinstance(prepared.mlp, PreparedMlp):
            down = layer.mlp.down
            assert isinstance(down, torch.nn.Linear)
            prepared.mlp.down = self._summed(down)
        else:
            prepared.mlp = SummedExperts(prepared.mlp, self._add_up)
        return prepared

    def _summed(self, linear: torch.nn.Linear) -> SummedLinear:
        bias = None if linear.bias is None else linear.bias.detach()
        return SummedLinear(linear.weight.detach(), bias, self.dtype, self._add_up)

    def _linear(self, weight: Tensor) -> Linear:
        return make_linear([weight.detach()], [None], self.dtype, ACTIVATION_FUNCTIONS)
