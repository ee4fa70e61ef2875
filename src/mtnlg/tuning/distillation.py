"""Learning from a teacher's logits (Hinton et al. 2015, arXiv 1503.02531), through the one loss rule.

The teacher reads the same batch as the student, whole on every rank; only at tokens that are scored are
its logits made, a chunk at a time, and forgotten with the chunk. Evaluations measure the cross entropy
alone, so that runs with and without a teacher can be compared.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtnlg.config import DistillationConfig, LayoutConfig, TuningConfig
from mtnlg.model import IGNORED_LABEL, LanguageModel, MegatronEncoderDecoder, MegatronLmDecoder
from mtnlg.model.decoder import Head
from mtnlg.model.loss import softcapped, tokens_per_chunk
from mtnlg.parallel.model import ParallelModel
from mtnlg.training.model_files import open_model_files

# What a teacher reads, by its own names, and what the student's stage calls it.
_OF_DECODERS = {"input_ids": "inputs", "position_ids": "position_ids", "document_ids": "document_ids"}
_OF_PAIRS = {
    "input_ids": "source",
    "decoder_input_ids": "target",
    "attention_mask": "encoder_mask",
    "document_ids": "document_ids",
    "decoder_document_ids": "decoder_document_ids",
}


def distillation_problems(tuning: TuningConfig, layout: LayoutConfig) -> list[str]:
    """Every reason why a run cannot learn from a teacher; empty when it can, or has none."""
    if tuning.distillation is None:
        return []
    problems = []
    for name in ("tensor", "pipeline", "context", "expert"):
        size = getattr(layout, f"{name}_parallel_size")
        if size > 1:
            problems.append(
                f"layout.{name}_parallel_size is {size}: a teacher's logits are compared where one rank "
                "has all of the student's; use data parallelism, or leave tuning.distillation out."
            )
    if tuning.method in ("prompt", "prefix"):
        problems.append(
            f"tuning.method is {tuning.method}: a teacher does not read virtual tokens; use full or lora."
        )
    return problems


def learn_from_teacher(model: ParallelModel, config: DistillationConfig) -> None:
    """Let ``model``'s training loss be the mixture of cross entropy and teacher that ``config`` says.

    Args:
        model: in one process, or the same on every replica.
        config: the teacher, its share and the temperature.

    Raises:
        CheckpointError: the teacher is not there.
    """
    (stage,) = model.stages
    head = stage.decoder.head
    assert head is not None
    loss = DistilledLoss(read_teacher(config.teacher, model.device), head, config)
    stage.register_forward_pre_hook(loss.listen, with_kwargs=True)
    head.loss_function = loss


def read_teacher(name: str, device: torch.device) -> LanguageModel:
    """The whole frozen teacher."""
    files = open_model_files(name)
    with torch.device("meta"):
        kind = MegatronEncoderDecoder if files.config.has_encoder else MegatronLmDecoder
        teacher: LanguageModel = kind(files.config)
    teacher.load_state_dict({name: tensor.to(device) for name, tensor in files.read().items()}, assign=True)
    teacher.tie_weights()
    return teacher.eval().requires_grad_(False)


class DistilledLoss:
    """Takes the place of a head's loss function while it trains.

    Args:
        teacher: whole, frozen.
        head: the student's.
        config: share and temperature.
    """

    def __init__(self, teacher: LanguageModel, head: Head, config: DistillationConfig) -> None:
        self._teacher, self._config = teacher, config
        self._reads = _OF_PAIRS if teacher.config.has_encoder else _OF_DECODERS
        self._plain = head.loss_function
        self._hidden: Tensor | None = None  # the teacher's, of the batch that the student is reading

    @torch.no_grad()
    def listen(self, stage: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Before the student reads a batch: let the teacher read it."""
        self._hidden = None
        if not stage.training:
            return
        names = list(inspect.signature(stage.forward).parameters)
        given = {**dict(zip(names, inputs)), **options}
        read = {name: given.get(old) for name, old in self._reads.items()}
        head, self._teacher.head = self._teacher.head, None
        try:
            output = self._teacher(**read)
        finally:
            self._teacher.head = head
        self._hidden = output.hidden  # [batch, sequence, teacher's hidden]

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None
    ) -> Tensor:
        """Hidden [batch, sequence, hidden], weight [vocab, hidden], labels [batch, sequence] → summed.

        ``softcap`` is of the student's logits; the teacher's own head knows its own.
        """
        if self._hidden is None:
            capped = {} if softcap is None else {"softcap": softcap}
            return self._plain(hidden, weight, labels, **capped)
        chosen = labels.flatten() != IGNORED_LABEL
        student = hidden.flatten(0, -2)[chosen]
        teacher = self._hidden.flatten(0, -2)[chosen]
        targets = labels.flatten()[chosen]
        self._hidden = None
        step = max(1, tokens_per_chunk(len(targets), 2 * weight.shape[0]))
        total = (hidden * 0.0).sum().float()  # so that a batch without a scored token has a gradient
        for parts in zip(student.split(step), teacher.split(step), targets.split(step)):
            total = total + checkpoint(self._chunk, *parts, weight, softcap, use_reentrant=False)
        return total

    def _chunk(
        self, student: Tensor, teacher: Tensor, targets: Tensor, weight: Tensor, softcap: float | None
    ) -> Tensor:
        assert self._teacher.head is not None
        with torch.no_grad():
            theirs = self._teacher.head(teacher).logits
        ours = softcapped(F.linear(student, weight), softcap)
        return distilled_cross_entropy(ours, theirs, targets, self._config.share, self._config.temperature)


def distilled_cross_entropy(
    student: Tensor, teacher: Tensor, targets: Tensor, share: float, temperature: float
) -> Tensor:
    """``share * T² KL(teacher || student) + (1 - share) * cross entropy``, summed over tokens.

    Args:
        student: logits [tokens, vocab].
        teacher: logits [tokens, vocab]. Embeddings of models that share a tokenizer may have been padded
            otherwise: the divergence is over the tokens that both have.
        targets: [tokens].
        share: of the teacher.
        temperature: T, of both distributions in the divergence.

    Returns:
        A float32 scalar, nats.
    """
    student, teacher = student.float(), teacher.float()
    both = min(student.shape[-1], teacher.shape[-1])
    ours = F.log_softmax(student[:, :both] / temperature, dim=-1)
    theirs = F.log_softmax(teacher[:, :both] / temperature, dim=-1)
    divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    known = F.cross_entropy(student, targets, reduction="sum")
    return share * temperature**2 * divergence + (1.0 - share) * known
