"""Which tensor of a Hugging Face family holds which parameter of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import groupby

from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.interop.encoder_decoder_families import (
    COPIES,
    EMBEDDING_NAME,
    ENCODER_DECODER_FAMILIES,
    UNUSED,
    encoder_decoder_names,
)
from mtnlg.interop.lazy_tensor import Cut, cut_and_read, join
from mtnlg.interop.names import decoder_rules
from mtnlg.interop.rule import Rule
from mtnlg.interop.tensor_folder import TensorFolder

HEAD = "head.output.weight"
EMBEDDING = "embedding.tokens.weight"
# Buffers of old releases that hold no weights.
_IGNORED_ENDINGS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
    UNUSED,
    *COPIES,
)


def rules(model_type: str, config: MegatronModelConfig) -> list[Rule]:
    """Every tensor of the family for this config, in the order of the model."""
    if model_type in ENCODER_DECODER_FAMILIES:
        return [Rule(theirs, (ours,)) for theirs, ours in encoder_decoder_names(config).items()]
    return decoder_rules(model_type, config)


def export_tensors(
    model_type: str, config: MegatronModelConfig, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors, one at a time.

    Args:
        model_type: the family.
        config: the architecture.
        read: our parameter by name.
    """
    for ours, group in groupby(rules(model_type, config), key=lambda rule: rule.ours):
        tensors = [read(name) for name in ours]  # once for all experts
        for rule in group:
            yield rule.theirs, rule.to_theirs(tensors)


def import_tensors(
    model_type: str,
    config: MegatronModelConfig,
    source: TensorFolder,
    where: str,
    wanted: Collection[str] | None = None,
    cut: Cut | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters by name, from a family's files, one tensor in memory at a time.

    Args:
        model_type: the family.
        config: the architecture.
        source: their tensors.
        where: named in errors.
        wanted: only these of ours; ``None`` is all.
        cut: what is wanted of each: a view of it; nothing else is read. ``None`` is all.

    Raises:
        CheckpointError: tensors are missing, left over or of other shapes, all of which are named; or one
            holds NaN.
    """
    for name, view in tensor_views(model_type, config, source, where, wanted):
        tensor = cut_and_read(name, view, cut)
        if tensor.is_floating_point() and tensor.itemsize > 1 and bool(tensor.isnan().any()):
            raise CheckpointError(
                f"{where}: {name} holds NaN: the file is damaged, or training had diverged before it was "
                "saved; fetch it anew, or take an earlier checkpoint."
            )
        yield name, tensor


def tensor_views(
    model_type: str,
    config: MegatronModelConfig,
    source: TensorFolder,
    where: str,
    wanted: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """As :func:`import_tensors`, lazy: nothing of them has been read."""
    places = _places(model_type, config, source, where)
    for ours, group in groupby(places.items(), key=lambda item: item[0].ours):
        if wanted is not None and not any(name in wanted for name in ours):
            continue
        found = list(group)
        rule, name = found[0]
        if rule.expert is None:
            views = rule.to_ours(source.lazy(name))
        else:
            views = [join([source.lazy(name) for _, name in found], is_new=True)]
        for name, view in zip(ours, views):
            if wanted is None or name in wanted:
                yield name, view


def _places(
    model_type: str, config: MegatronModelConfig, source: TensorFolder, where: str
) -> dict[Rule, str]:
    """Where each rule's tensor is found."""
    sought = {rule: _find(rule.theirs, source) for rule in rules(model_type, config)}
    places = {rule: name for rule, name in sought.items() if name is not None}
    missing = [rule.theirs for rule in sought if rule not in places]
    extra = sorted(
        name for name in source.names - set(places.values()) if not may_be_left_over(name, config)
    )
    shapes = {rule: (source.shape(name), rule.shape) for rule, name in places.items()}
    wrong = {rule: pair for rule, pair in shapes.items() if pair[1] is not None and pair[0] != pair[1]}
    if missing or extra or wrong:
        problems = [f"tensor {name} is missing" for name in missing]
        problems += [f"tensor {name} belongs to no parameter" for name in extra]
        problems += [
            f"tensor {places[rule]} has the shape {list(found)}, expected {list(expected or ())}"
            for rule, (found, expected) in wrong.items()
        ]
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{where}: the weights do not fit config.json: {shown}.")
    return places


def _find(name: str, source: TensorFolder) -> str | None:
    """The name as it is, or without the family's prefix, as files of the bare model have it."""
    bare = name.split(".", 1)[1]
    copies = COPIES if name == EMBEDDING_NAME else ()
    return next((candidate for candidate in (name, bare, *copies) if candidate in source.names), None)


def may_be_left_over(name: str, config: MegatronModelConfig) -> bool:
    """Whether a tensor without a parameter is a copy of another, or a buffer of old releases."""
    tied_copy = config.tie_word_embeddings and name in ("lm_head.weight", "embed_out.weight")
    return tied_copy or name.endswith(_IGNORED_ENDINGS)
