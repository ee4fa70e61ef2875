"""Text to tokens and back: ``/v1/tokenize``, ``/v1/detokenize`` and what lm_eval asks beside them."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter, ValidationError

from mtnlg.serving.chat_schemas import Message
from mtnlg.serving.conversation import Conversation, prompt_of
from mtnlg.serving.errors import invalid, of_validation
from mtnlg.serving.prompts import ids_of_texts, off_the_loop
from mtnlg.serving.schemas import DetokenizeRequest, TokenizeRequest
from mtnlg.serving.state import state_of

MESSAGES = TypeAdapter(list[Message])


async def tokenize(body: TokenizeRequest, request: Request) -> JSONResponse:
    """Token ids of a text, or of a conversation as the template lays it out."""
    state = state_of(request)
    state.chosen_adapter(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Give either 'prompt' or 'messages'.", "prompt", "missing_required_parameter")
    if body.messages is not None:
        try:
            messages = MESSAGES.validate_python(body.messages, strict=True)
        except ValidationError as error:
            problems = [{**found, "loc": ("messages", *found["loc"])} for found in error.errors()]
            raise of_validation(problems) from error
        ids = (await prompt_of(state, Conversation(messages))).ids
    else:
        start = list(state.backend.start_ids) if body.add_special_tokens else []
        [ids] = await ids_of_texts(state, [body.prompt or ""], "prompt", body.parse_special)
        ids = start + ids
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": state.backend.engine.max_length,
        "tokens": ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = [state.backend.vocabulary.name_of(token) for token in ids]
    return JSONResponse(answer)


async def detokenize(body: DetokenizeRequest, request: Request) -> JSONResponse:
    """The text of token ids."""
    state = state_of(request)
    state.chosen_adapter(body.model)
    size = state.backend.vocab_size
    if body.tokens and max(body.tokens) >= size:
        message = f"Invalid 'tokens': token {max(body.tokens)} is not in the vocabulary (0 to {size - 1})."
        raise invalid(message, "tokens", "invalid_value")
    decode = state.backend.tokenizer.decode
    text = await off_the_loop(
        state, lambda: decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    )
    return JSONResponse({"prompt": text})


async def tokenizer_info(request: Request) -> JSONResponse:
    """What a program needs to know of the tokenizer: special tokens and the chat template."""
    state = state_of(request)
    state.check_ready()
    backend = state.backend
    names = backend.tokenizer.special_names
    return JSONResponse(
        {
            "tokenizer_class": backend.tokenizer.settings.get("tokenizer_class"),
            "vocab_size": backend.vocab_size,
            "max_model_len": backend.engine.max_length,
            "bos_token": names.get("bos_token"),
            "eos_token": names.get("eos_token"),
            "pad_token": names.get("pad_token"),
            "unk_token": names.get("unk_token"),
            "chat_template": backend.tokenizer.chat_template,
        }
    )
