"""Continuations of fixed prompts during training: what the numbers look like as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mtnlg.config import RunConfig
from mtnlg.generation import SamplingRules, generate
from mtnlg.model import LanguageModel, MegatronEncoderDecoder, MegatronLmDecoder
from mtnlg.parallel.model import ParallelModel
from mtnlg.parallel.weights import whole_tensor
from mtnlg.tokens.tokenizer import Tokenizer
from mtnlg.training.events import Sample

TEMPERATURE, TOP_P = 0.8, 0.95


def write_samples(
    model: ParallelModel, config: RunConfig, step: int, on_sample: Callable[[Sample], None]
) -> None:
    """Continue ``evaluation.prompts``; every rank calls this and rank 0 writes.

    Args:
        model: the laid-out model; a divided one is gathered on rank 0 for the time being.
        config: prompts, their length, and where the tokenizer is.
        step: steps done; also seeds the sampling.
        on_sample: told of each sample.
    """
    prompts = config.evaluation.prompts
    if not prompts:
        return
    decoder = model.decoder if model.is_whole else gather_decoder(model)
    if decoder is None:
        return
    tokenizer = Tokenizer.from_pretrained(Path(config.run_dir) / "tokenizer")
    rules = SamplingRules(temperature=TEMPERATURE, top_p=TOP_P, seed=config.seed)
    ids = prompt_ids(prompts, tokenizer, config)
    end_ids = [config.model.eos_token_id if config.model.has_encoder else tokenizer.end_of_text_id]
    continuations = generate(
        decoder, ids, rules, max_new_tokens=config.evaluation.sample_tokens, end_ids=end_ids
    )
    for prompt, continuation in zip(prompts, continuations):
        on_sample(Sample(step, prompt, tokenizer.decode(continuation.new_ids)))


def prompt_ids(prompts: Sequence[str], tokenizer: Tokenizer, config: RunConfig) -> list[list[int]]:
    """Token ids of each prompt.

    What an encoder reads is what it reads in training: sentinels by their names, and the end behind.
    """
    if config.model.has_encoder:
        end = [] if config.data.objective.name == "prefix_lm" else [config.model.eos_token_id]
        return [[*tokenizer.encode(prompt, allow_special=True), *end] for prompt in prompts]
    longest = config.model.max_cached_length - config.evaluation.sample_tokens
    return [tokenizer.encode(prompt)[-max(1, longest) :] for prompt in prompts]


def gather_decoder(model: ParallelModel) -> LanguageModel | None:
    """The whole plain model on rank 0, ``None`` elsewhere; every rank calls this."""
    mesh = model.mesh
    ours: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = whole_tensor(tensor)
        if mesh.replica == mesh.context_rank == mesh.tensor_rank == 0:
            ours[name] = whole.cpu()
    stages: list[dict[str, Tensor]] | None = [{}] * mesh.num_ranks if mesh.is_main else None
    dist.gather_object(ours, stages, dst=0)
    if stages is None:
        return None
    with torch.device("meta"):
        kind = MegatronEncoderDecoder if model.config.has_encoder else MegatronLmDecoder
        decoder: LanguageModel = kind(model.config)
    decoder.to_empty(device="cpu")
    decoder.tie_weights()
    state = {name: tensor for stage in stages for name, tensor in stage.items()}
    decoder.load_state_dict(state, strict=False)
    return decoder
