"""The laid-out model: one class for one process and for any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig, PrecisionConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.model import IGNORED_LABEL, MegatronLmDecoder
from mtnlg.parallel import gradients
from mtnlg.parallel.adapters import with_virtual_tokens
from mtnlg.parallel.context import part_of_sequence
from mtnlg.parallel.data import DTYPES, BackwardCount, keep_weights
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.pipeline import Pipeline, first_inputs, stage_options
from mtnlg.parallel.routing import ExpertLoad, Routing
from mtnlg.parallel.stage import Stage
from mtnlg.parallel.weights import TIED_COPY, TIED_ORIGINAL, canonical_name, share_ends
from mtnlg.tokens.batch import Batch


class ParallelModel:
    """A decoder laid out over ranks, with the same methods whatever the layout.

    In one process there is no process group, no DTensor and no wrapper around the layers.
    Parameters go by the names of the plain model.

    Args:
        stages: those that this rank runs, in the order of the model.
        config: the whole architecture.
        mesh: this rank's place.
        precision: of the computation; the parameters named here stay float32. In 16 bits a working
            copy is cast after each step, and where FSDP frees weights it casts as it gathers.
        adapter: what is trained beside frozen weights, if anything is.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        config: MegatronModelConfig,
        mesh: Mesh,
        precision: PrecisionConfig,
        adapter: AdapterConfig | None = None,
    ) -> None:
        dtype = DTYPES[precision.dtype]
        self.stages = list(stages)
        self.config = config
        self.adapter = adapter
        self.mesh = mesh
        self.device = mesh.device
        self._pipeline: Pipeline | None = None
        if mesh.num_stages > 1:
            self._pipeline = Pipeline(self.stages, mesh, config, dtype)
        self._routing = Routing(self.stages, config, mesh)
        names = {
            canonical_name(name): item for stage in self.stages for name, item in stage.named_parameters()
        }
        # The last stage's copy of a tied embedding goes by the embedding's name, as in one process.
        has_copy = config.tie_word_embeddings and mesh.num_stages > 1 and mesh.has_last_stage
        self._holds_tied_copy = has_copy and not mesh.has_first_stage
        if self._holds_tied_copy:
            names[TIED_ORIGINAL] = names.pop(TIED_COPY)
        elif has_copy:  # this rank has both ends (V-shaped schedules): they share one parameter
            share_ends(self.stages)
            del names[TIED_COPY]
        self._parameters = names
        self._backward_counts = [BackwardCount(stage, mesh, precision) for stage in self.stages]
        shared = {TIED_ORIGINAL} if has_copy and mesh.has_first_stage else set()
        self._keeper = keep_weights(names, self.stages, mesh, precision, shared)
        if self._keeper is not None:
            self._parameters = self._keeper.masters
            if self._pipeline is not None:
                self._pipeline.after_weights = self._keeper.collect

    @property
    def decoder(self) -> MegatronLmDecoder:
        """This rank's first stage; in one process the whole plain model, fit for generation."""
        self._refresh()
        return self.stages[0].decoder

    @property
    def is_whole(self) -> bool:
        """Whether :attr:`decoder` is the whole plain model (there is only one process)."""
        return self.mesh.device_mesh is None

    def train(self, mode: bool = True) -> ParallelModel:
        """Switch dropout on or off."""
        for stage in self.stages:
            stage.train(mode)
        return self

    def eval(self) -> ParallelModel:
        """Switch dropout off."""
        return self.train(False)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by the plain model's names; the tied head is the embedding.

        Laid out, a parameter is a DTensor of the whole shape. The last stage's copy of a tied
        embedding comes under the embedding's name too, and must be stepped like the first stage's; on
        the rank of the first stage it does not come at all.
        """
        yield from self._parameters.items()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's weights by the plain model's names, sharing memory: save from it, load into it."""
        if self._keeper is not None:
            self._keeper.expect_writes()
        weights = {name: item.detach() for name, item in self._parameters.items()}
        return weights | self._routing.biases()

    def seed_dropout(self, seed: int, step: int) -> None:
        """Set the random stream of dropout for one step, so that a resumed run repeats it.

        Replicas and stages get streams of their own. Tensor-parallel ranks do too under sequence
        parallelism, where each holds other positions; without it they must drop the same elements.
        """
        mesh = self.mesh
        tensor = mesh.tensor_rank if mesh.layout.sequence_parallel else 0
        place = mesh.pipeline_rank * mesh.num_replicas + mesh.replica
        place = (place * mesh.context_size + mesh.context_rank) * mesh.tensor_size + tensor
        torch.manual_seed(((seed * 1_000_003 + step) * mesh.num_ranks + place) % 2**63)

    def forward_backward(
        self, batches: Sequence[Batch], num_valid_tokens: Tensor | float, loss_scale: float = 1.0
    ) -> Tensor:
        """Add the gradient of one step to ``.grad``.

        The gradient is that of ``loss_scale * (sum of cross entropies / num_valid_tokens)``, summed
        over all ranks: dividing by the count of the whole step weighs every token alike.

        Args:
            batches: this replica's micro-batches, all of one shape; ranks that share sequences are
                given whole ones too.
            num_valid_tokens: labels that are not ignored, over all micro-batches and replicas.
            loss_scale: fp16's factor.

        Returns:
            The unscaled loss summed over this replica's tokens (float32 scalar, nats); zero on stages
            before the last. :meth:`Mesh.sum_of_loss` makes it the step's.
        """
        self._refresh()
        for count in self._backward_counts:
            count.begin(len(batches))
        if self._keeper is not None:
            self._keeper.begin(len(batches))
        factor = loss_scale / torch.as_tensor(num_valid_tokens, dtype=torch.float32, device=self.device)
        self._routing.begin(factor)
        batches = [self._as_read(batch) for batch in batches]
        if self._pipeline is not None:
            total = self._pipeline.forward_backward(batches, factor)
        else:
            total = self._accumulate(batches, factor)
        self._finish_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Summed loss and number of valid tokens of ``batches`` over all replicas.

        Args:
            batches: this replica's micro-batches; every replica gives as many.

        Returns:
            Two float64 scalars, the same on every rank.
        """
        self._refresh()
        training = self.stages[0].training
        self.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            batch = self._as_read(batch)
            loss = self._pipeline.evaluate(batch) if self._pipeline else self._loss(batch)
            if self.mesh.has_last_stage:
                sums[0] += loss
                sums[1] += (batch.labels != IGNORED_LABEL).sum()
        self.train(training)
        self.mesh.sum_of_loss(sums)
        return sums[0], sums[1]

    def expert_load(self) -> ExpertLoad | None:
        """How the last step used the experts; every rank calls this. ``None`` in a dense model."""
        return self._routing.load()

    def move_router_biases(self, load: ExpertLoad) -> None:
        """After an optimizer step: balance the experts by their load, where the config says so.

        Beside an adapter they stay as they are, like all of the base.
        """
        if self.adapter is None:
            self._routing.move_biases(load)

    def gradient_norm(self) -> Tensor:
        """Norm of the gradients of the whole model, the tied embedding counted once (float32 scalar)."""
        elsewhere = TIED_ORIGINAL if self._holds_tied_copy else ""
        return gradients.gradient_norm(self._parameters, self.mesh, elsewhere)

    def scale_gradients(self, factor: Tensor | float) -> None:
        """Multiply every gradient by ``factor`` (clipping, undoing the loss scale)."""
        gradients.scale_gradients(self._parameters.values(), factor)

    def zero_gradients(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def _accumulate(self, batches: Sequence[Batch], factor: Tensor) -> Tensor:
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self._loss(batch)
            (loss * factor).backward()
            total += loss.detach()
        return total

    def _finish_gradients(self) -> None:
        if self._keeper is not None:
            self._keeper.finish()
        gradients.finish_partial_sums(self._parameters.values())
        if self.config.tie_word_embeddings and self.mesh.ends_group is not None:
            gradients.sum_tied_copies(self._parameters[TIED_ORIGINAL].grad, self.mesh)

    def _as_read(self, batch: Batch) -> Batch:
        """What this rank reads of a batch, on its device."""
        batch = with_virtual_tokens(batch, self.adapter, self.config.vocab_size)
        return part_of_sequence(batch, self.mesh).to(self.device)

    def _loss(self, batch: Batch) -> Tensor:
        (stage,) = self.stages
        return stage(*first_inputs(batch), **stage_options(batch))

    def _refresh(self) -> None:
        if self._keeper is not None:
            self._keeper.refresh()
