"""Ids of the special tokens that an objective needs, from the run's tokenizer."""

from __future__ import annotations

from dataclasses import replace

from mtnlg.config import ConfigError, MegatronModelConfig, RunConfig
from mtnlg.config.objective import NUM_SENTINELS, SENTINEL_NAME, Denoiser
from mtnlg.tokens.tokenizer import Tokenizer


def tokens_to_learn(config: RunConfig) -> list[str]:
    """Names that a tokenizer trained for this run must have: sentinels and modes; none for most runs."""
    objective = config.data.objective
    if not objective.needs_sentinels:
        return objective.modes()
    length = objective.text_length(config.data.sequence_length, config.model.has_encoder)
    count = max(NUM_SENTINELS, *(_most_spans(denoiser, length) for denoiser in objective.chosen()))
    return [*(SENTINEL_NAME.format(number) for number in range(count)), *objective.modes()]


def with_special_tokens(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """``config`` with the ids that ``data.objective`` leaves open, and an encoder-decoder's own.

    An encoder-decoder whose recipe leaves the vocabulary to the tokenizer takes its end of text and its
    padding; another has said which they are.

    Raises:
        ConfigError: the tokenizer has no sentinels, or not a mode that a denoiser names.
    """
    model, objective = config.model, config.data.objective
    if model.has_encoder and config.tokenizer.sets_vocab_size:
        model = _with_ends(model, tokenizer)
    if objective.is_causal:
        return replace(config, model=model)
    encoder = model.has_encoder
    ends = {
        "end_id": model.eos_token_id if encoder else tokenizer.end_of_text_id,
        "padding_id": model.pad_token_id if encoder else tokenizer.padding_id,
        "start_id": model.decoder_start_token_id if encoder else None,
    }
    found: dict[str, object] = {
        name: value for name, value in ends.items() if getattr(objective, name) is None
    }
    if objective.needs_sentinels and objective.sentinel_ids is None:
        found["sentinel_ids"] = _sentinels(tokenizer)
    if objective.modes() and objective.mode_ids is None:
        found["mode_ids"] = _modes(objective.modes(), tokenizer)
    data = replace(config.data, objective=replace(objective, **found))  # type: ignore[arg-type]
    return replace(config, model=model, data=data)


def _with_ends(model: MegatronModelConfig, tokenizer: Tokenizer) -> MegatronModelConfig:
    padding = tokenizer.padding_id
    return replace(
        model,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.end_of_text_id,
        pad_token_id=padding,
        decoder_start_token_id=padding,
    )


def _sentinels(tokenizer: Tokenizer) -> str:
    ids: list[int] = []
    while (index := tokenizer.core.token_to_id(SENTINEL_NAME.format(len(ids)))) is not None:
        ids.append(index)
    step = 1 if ids[-1:] > ids[:1] else -1
    if not ids or ids != list(range(ids[0], ids[-1] + step, step)):
        raise ConfigError(
            "the tokenizer has no sentinels <extra_id_0>, <extra_id_1>, ... with ids in a row, which stand "
            "for what data.objective takes out. Give ids that it does not use for text as "
            "data.objective.sentinel_ids, train a tokenizer for this run (leave tokenizer.path out), or "
            "choose data.objective.name: prefix_lm."
        )
    return f"{ids[0]}-{ids[-1]}"


def _modes(names: list[str], tokenizer: Tokenizer) -> dict[str, int]:
    found = {name: tokenizer.core.token_to_id(name) for name in names}
    missing = [name for name, index in found.items() if index is None]
    if missing:
        raise ConfigError(
            f"the tokenizer has no token {', '.join(missing)}, which data.objective puts before a text. "
            "Give ids as data.objective.mode_ids, name tokens that it has in data.objective.denoisers, or "
            "leave the modes out of them."
        )
    return {name: index for name, index in found.items() if index is not None}


def _most_spans(denoiser: Denoiser, text_length: int) -> int:
    return denoiser.noise_and_spans(text_length)[1] if denoiser.kind == "spans" else 1
