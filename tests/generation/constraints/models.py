"""Tokenizers with different habits, and a model that knows nothing."""

import json
from functools import lru_cache
from pathlib import Path

import torch

from mtnlg.config import MegatronModelConfig
from mtnlg.generation.engine import Engine
from mtnlg.generation.request import GenerationRequest
from mtnlg.generation.sampling import SamplingRules
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.tokens import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
SPARE_IDS = 37  # the model's vocabulary is larger than the tokenizer's


@lru_cache
def make_tokenizer() -> Tokenizer:
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "data" / "zh").glob("*.txt"))]
    return Tokenizer.train([*texts, '{"name": "Ada", "age": 36, "tags": ["a", "b"]}\n' * 20], 1500)


@lru_cache
def make_careless_tokenizer() -> Tokenizer:
    """Its tokens run across marks, new lines and the middle of characters."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers, trainers

    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    verse = [(ROOT / "data" / "zh" / name).read_text("utf-8") for name in ("01-wuyan.txt", "02-qiyan.txt")]
    pieces = [text[i : i + 11] for text in verse for i in range(0, len(text), 11)]
    core.train_from_iterator(pieces, trainer)
    assert json.loads(core.to_str())["model"]["type"] == "BPE"
    return Tokenizer(core.to_str())


def make_engine(tokenizer, length=512):
    config = MegatronModelConfig(
        vocab_size=tokenizer.vocab_size + SPARE_IDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        init_method_std=0.3,
    )
    model = MegatronLmDecoder(config)
    initialize_weights(model, config, seed=5)
    return Engine(model.eval(), tokenizer.decode)


def generate(engine, constraints, max_new_tokens=400, end_ids=()):
    """A generation for each constraint, all in one batch, drawn from a model that knows nothing."""
    with torch.no_grad():
        found = [
            engine.submit(
                GenerationRequest(
                    [7, 8],
                    SamplingRules(temperature=3.0, seed=seed),
                    max_new_tokens=max_new_tokens,
                    constraint=constraint,
                    end_ids=end_ids,
                )
            )
            for seed, constraint in enumerate(constraints)
        ]
        return [generation.result() for generation in found]
