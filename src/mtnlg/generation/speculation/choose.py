"""Who guesses, as the settings say."""

from __future__ import annotations

from mtnlg.config.errors import ConfigError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.choose_runner import make_runner
from mtnlg.generation.scheduler import Drafter
from mtnlg.generation.speculation.model import ModelDrafter
from mtnlg.generation.speculation.ngram import NgramDrafter
from mtnlg.model import MegatronLmDecoder


def make_drafter(
    config: EngineConfig, vocab_size: int, draft_model: MegatronLmDecoder | None = None
) -> Drafter | None:
    """The drafter that ``config.speculation`` names, or the draft model where there is one.

    Args:
        config: settings; the draft model has memory of its own for its keys and values, by the same
            rule as the large one.
        vocab_size: of the large model.
        draft_model: the small model, in evaluation mode.

    Raises:
        ConfigError: the settings and the draft model do not fit together.
    """
    if config.speculation == "ngram" and draft_model is not None:
        raise ConfigError("there is a draft model and speculation is 'ngram': only one can guess.")
    if config.speculation == "draft" or draft_model is not None:
        if draft_model is None:
            raise ConfigError("speculation is 'draft' and there is no draft model: give one.")
        if draft_model.config.vocab_size != vocab_size:
            raise ConfigError(
                f"the draft model has {draft_model.config.vocab_size:,} tokens and the model "
                f"{vocab_size:,}: both need the same tokenizer and vocabulary."
            )
        runner = make_runner(draft_model, config)
        return ModelDrafter(runner, config.num_speculative_tokens, config.prefill_chunk)
    if config.speculation == "ngram":
        return NgramDrafter(config.num_speculative_tokens, config.min_ngram, config.max_ngram)
    return None
