"""What ranks run in the tests of generation over ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tests.generation.adapters import make_adapter
from tests.parallel.workers import mesh_of
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.config.generation import EngineConfig
from mtnlg.generation import Engine, GenerationRequest, SamplingRules
from mtnlg.generation.encoder_decoder_runner import EncoderDecoderRunner
from mtnlg.generation.ranks import RankRunner, Share, follow
from mtnlg.generation.runner import PlainRunner, Row, Runner
from mtnlg.interop.adapter import Adapter, load_adapter
from mtnlg.model import LanguageModel, MegatronEncoderDecoder, MegatronLmDecoder, initialize_weights
from mtnlg.parallel.inference import Cut

REQUESTS = [
    dict(prompt_ids=[5, 9, 2, 40, 33], max_new_tokens=9),
    dict(prompt_ids=[11], max_new_tokens=12),
    dict(prompt_ids=[7] * 21, max_new_tokens=6, rules=SamplingRules(temperature=0.9, top_p=0.9, seed=4)),
    dict(prompt_ids=list(range(40)), max_new_tokens=4, rules=SamplingRules(temperature=1.3, seed=9)),
]


@dataclass(frozen=True)
class Weights:
    """Reads a plain model's weights by name, as files would be."""

    config: MegatronModelConfig

    def __call__(self, names: Collection[str], cut: Cut) -> Iterator[tuple[str, Tensor]]:
        state = plain_model(self.config).state_dict()
        yield from ((name, cut(name, state[name]).clone()) for name in names)


def plain_model(config: MegatronModelConfig) -> LanguageModel:
    model = MegatronEncoderDecoder(config) if config.has_encoder else MegatronLmDecoder(config)
    initialize_weights(model, config, seed=3)
    return model.eval()


def share_of(model_fields: dict[str, Any], tensor: int, pipeline: int) -> Share:
    config = MegatronModelConfig(**model_fields)
    layout = dict(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=1)
    return Share(config, mesh_of({**layout, "sequence_parallel": False}), Weights(config))


def generate(
    model_fields: dict[str, Any], tensor: int, pipeline: int, engine_fields: dict[str, Any]
) -> list[list[int]] | None:
    """The new tokens of all requests, answered together over the ranks."""
    share = share_of(model_fields, tensor, pipeline)
    if dist.get_rank() > 0:
        follow(share)
        return None
    engine = EngineConfig(**engine_fields)
    runner = RankRunner(share, engine)
    try:
        return answers(runner, share.config, engine)
    finally:
        runner.close()


def answers(runner: Runner, config: MegatronModelConfig, engine: EngineConfig) -> list[list[int]]:
    with torch.device("meta"):
        shapes = MegatronEncoderDecoder(config) if config.has_encoder else MegatronLmDecoder(config)
    running = Engine(shapes, None, engine, runner)
    handles = [running.submit(GenerationRequest(**fields)) for fields in REQUESTS]  # type: ignore[arg-type]
    return [handle.result().new_ids for handle in handles]


def expected(model_fields: dict[str, Any], engine_fields: dict[str, Any]) -> list[list[int]]:
    """The same of one process with the plain runner."""
    config = MegatronModelConfig(**model_fields)
    kind = EncoderDecoderRunner if config.has_encoder else PlainRunner
    return answers(kind(plain_model(config), num_pages=64), config, EngineConfig(**engine_fields))


OWN = "prompt"  # what requests have that name no adapter
NAMED = (None, "low-rank", "everywhere", "dora", "prompt-behind", "prefix", "everywhere", None)


def generate_mixed(
    model_fields: dict[str, Any], tensor: int, pipeline: int, engine_fields: dict[str, Any]
) -> list[list[int]] | None:
    """The new tokens of requests with adapters of all kinds, and of one with the model's own."""
    share = share_of(model_fields, tensor, pipeline)
    if dist.get_rank() > 0:
        follow(share)
        return None
    engine, config = EngineConfig(**engine_fields), share.config
    adapters = adapters_of(plain_model(config))
    runner = RankRunner(share, engine)
    found = mixed_answers(runner, config, engine, adapters)
    runner.close(ends_ranks=False)
    runner = RankRunner(share, engine, own=adapters[OWN])  # over the stages that are there
    try:
        return [*found, own_answer(runner, config, adapters[OWN])]
    finally:
        runner.close()


def expected_mixed(model_fields: dict[str, Any], engine_fields: dict[str, Any]) -> list[list[int]]:
    """The same of one process with the plain runner."""
    config = MegatronModelConfig(**model_fields)
    model = plain_model(config)
    adapters = adapters_of(model)
    engine = EngineConfig(**engine_fields)
    found = mixed_answers(PlainRunner(model, num_pages=128), config, engine, adapters)
    load_adapter(model, adapters[OWN])
    return [*found, own_answer(PlainRunner(model, num_pages=64), config, adapters[OWN])]


def adapters_of(model: MegatronLmDecoder) -> dict[str, Adapter]:
    return {name: make_adapter(model, name) for name in dict.fromkeys((*NAMED, OWN)) if name is not None}


def mixed_answers(
    runner: Runner, config: MegatronModelConfig, engine: EngineConfig, adapters: dict[str, Adapter]
) -> list[list[int]]:
    with torch.device("meta"):
        shapes = MegatronLmDecoder(config)
    running = Engine(shapes, None, engine, runner)
    for name, adapter in adapters.items():
        running.adapters.add(name, adapter)
    prompts = [[number + 3, *range(number * 3)] for number in range(len(NAMED))]
    requests = [GenerationRequest(ids, max_new_tokens=5, adapter=one) for ids, one in zip(prompts, NAMED)]
    handles = [running.submit(request) for request in requests]
    running.adapters.remove("low-rank")
    return [handle.result().new_ids for handle in handles]


def own_answer(runner: Runner, config: MegatronModelConfig, own: Adapter) -> list[int]:
    with torch.device("meta"):
        shapes = MegatronLmDecoder(config)
    shapes.adapter = own.config
    request = GenerationRequest([5, 9, 2], max_new_tokens=5)
    return Engine(shapes, None, EngineConfig(), runner).submit(request).result().new_ids


ROWS = [
    Row([3, 1, 4, 1, 5], 0, [2, 7], 3),
    Row([9], 0, [5], 0),
    Row([2, 6, 5], 0, [1], 1),
]
LATER = [Row([8], 5, [2, 7]), Row([8, 8], 1, [5], 2), Row([8], 3, [1])]


def logits_and_hidden(model_fields: dict[str, Any], tensor: int, pipeline: int) -> Any:
    """Two steps over the same rows, pages copied between them, and hidden states."""
    share = share_of(model_fields, tensor, pipeline)
    if dist.get_rank() > 0:
        follow(share)
        return None
    runner = RankRunner(share, EngineConfig(max_batch_size=6))
    try:
        return steps(runner)
    finally:
        runner.close()


def steps(runner: Runner) -> list[Any]:
    first = runner.run(ROWS)
    runner.copy_pages([2, 1], [9, 10])
    moved = [Row([8], 5, [9, 7]), LATER[1], Row([8], 3, [10])]
    second, hidden = runner.run(moved), runner.hidden([Row([1, 2, 3], 0, [11]), Row([4], 0, [12])])
    return [first.numpy(), second.numpy(), *(part.numpy() for part in hidden)]


def plain_steps(model_fields: dict[str, Any]) -> list[Any]:
    return steps(PlainRunner(plain_model(MegatronModelConfig(**model_fields)), num_pages=16))
