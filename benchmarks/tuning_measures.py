"""What ``benchmarks/tuning.py`` asks of a model: loss on held-out text, and numbers of its answers."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from tuning_data import HAN

MOST_TOKENS = 16_384  # of held-out samples
NUM_SHOWN = 8


def text_loss(model, path: Path, most_texts: int = 300) -> dict[str, float]:
    """Of a base on held-out poems, each by itself up to 127 tokens: nats a token, a character, bits a byte.

    Characters and bytes compare models whose tokenizers cut text otherwise.
    """
    import json
    import math

    tokenizer = model.tokenizer
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = lines[:: max(1, len(lines) // most_texts)]
    nats = tokens = characters = num_bytes = 0.0
    for line in lines:
        ids = [tokenizer.end_of_text_id, *tokenizer.encode("\n".join(json.loads(line)["paragraphs"]))][:128]
        text = tokenizer.decode(ids[1:]).rstrip("\ufffd")
        with torch.no_grad():
            nats += float(model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])).loss)
        tokens, characters = tokens + len(ids) - 1, characters + len(text)
        num_bytes += len(text.encode("utf-8"))
    return {
        "nats_per_token": nats / tokens,
        "nats_per_character": nats / characters,
        "bits_per_byte": nats / num_bytes / math.log(2.0),
    }


def sample_loss(model, stream, sequence_length: int) -> dict[str, float]:
    """Mean over the scored tokens of held-out samples, as training reads them; and over characters."""
    from mtnlg.model import IGNORED_LABEL

    nats = valid = characters = 0.0
    specials = set(model.tokenizer.special_tokens.values())
    for start in range(0, min(stream.num_samples, max(1, MOST_TOKENS // sequence_length)), 8):
        batch = stream.batch(start, 8)
        with torch.no_grad():
            output = model(batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
        nats, valid = nats + float(output.loss), valid + batch.num_valid_tokens
        labels = batch.labels[batch.labels != IGNORED_LABEL].tolist()
        characters += len(model.tokenizer.decode([token for token in labels if token not in specials]))
    return {"loss": nats / valid, "nats_per_character": nats / characters, "scored_tokens": int(valid)}


def answer_all(model, questions: list[list[dict]], **options) -> list[tuple[str, bool]]:
    """Greedy answers, and whether the model ended each itself."""
    from mtnlg.generation.dialogue_format import dialogue_prompt

    prompts = [dialogue_prompt(model.tokenizer, messages) for messages in questions]
    settings = {"max_new_tokens": 48, "temperature": 0.0, "details": True, **options}
    answers = []
    for prompt, done in zip(prompts, model.generate([prompt.ids for prompt in prompts], **settings)):
        ids = list(done.new_ids)
        end = next((place for place, token in enumerate(ids) if token in prompt.end_ids), None)
        is_ended = end is not None or done.finish_reason != "length"  # a rule that is done ends a text too
        answers.append((model.tokenizer.decode(ids[:end]).strip(), is_ended))
    return answers


def in_verse(model, questions: list[list[dict]], lengths: list[int]) -> list[tuple[str, bool]]:
    """Greedy answers that the form of one line of so many characters lets through."""
    answers: list[tuple[str, bool]] = [("", False)] * len(questions)
    for length in sorted(set(lengths)):
        places = [place for place, one in enumerate(lengths) if one == length]
        chosen = [questions[place] for place in places]
        for place, answer in zip(places, answer_all(model, chosen, verse=str(length))):
            answers[place] = answer
    return answers


def couplet_scores(
    uppers: list[str], answers: list[tuple[str, bool]], wanted: list[str]
) -> dict[str, float]:
    """Shares of answers that are a second line, and how they look beside the poet's."""
    fits = [
        is_ended and re.fullmatch(rf"{HAN}{{{len(upper)}}}。", text) is not None
        for upper, (text, is_ended) in zip(uppers, answers)
    ]
    fresh = [
        fit and not set(upper) & set(text) and len(set(text)) == len(text)
        for fit, upper, (text, _) in zip(fits, uppers, answers)
    ]
    return {
        "in_form": _mean(fits),
        "well_formed": _mean(fresh),
        "level_end": _mean([len(text) > 1 and _is_level(text.rstrip("。")[-1:]) for text, _ in answers]),
        **common_scores(answers, wanted),
    }


def common_scores(answers: list[tuple[str, bool]], wanted: list[str]) -> dict[str, float]:
    """Of any answers: ended by the model, like the reference, unlike each other."""
    texts = [text for text, _ in answers]
    return {
        "ended": _mean([is_ended for _, is_ended in answers]),
        "overlap": _mean([overlap(text, one) for text, one in zip(texts, wanted)]),
        "distinct": distinct(texts),
        "characters": _mean([len(text) for text in texts]),
    }


def overlap(text: str, wanted: str) -> float:
    """F1 of the characters that two texts have in common."""
    common = sum((Counter(text) & Counter(wanted)).values())
    return 2.0 * common / max(1, len(text) + len(wanted))


def distinct(texts: list[str]) -> float:
    """Distinct-2 (Li et al. 2016, arXiv 1510.03055): different pairs of characters over all pairs."""
    pairs = [text[place : place + 2] for text in texts for place in range(len(text) - 1)]
    return len(set(pairs)) / max(1, len(pairs))


def _is_level(letter: str) -> bool:
    """Whether one of the character's readings is level (平), as most second lines end."""
    from mtnlg.generation.constraints.verse.rhymes import LEVEL, alphabet, rhyme_book

    number = alphabet().number.get(letter)
    return number is not None and bool(rhyme_book("pingshui").tones[number] & LEVEL)


def _mean(values) -> float:
    return sum(values) / max(1, len(values))
