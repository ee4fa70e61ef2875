"""What requests may hold: OpenAI's fields, and ours beside them.

Fields that nobody knows are refused, as OpenAI does. Of OpenAI's own, those that decide nothing here
(``user``, ``store``, ...) are read and ignored; those that would change the answer in a way that this
server cannot are refused where they are used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError, ValidationError

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16

Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
# A list is given up at its first wrong entry: a million of them are no reason to write a million sentences.
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


def one_of(words: str) -> WrapValidator:
    """Says ``expected WORDS`` where no branch of a union fits, instead of one sentence for each."""

    def check(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            raise PydanticCustomError("union_type", "expected {expected}", {"expected": words}) from error

    return WrapValidator(check)


Prompt = Annotated[
    str | Annotated[list[str], Field(fail_fast=True)] | Ids | Annotated[list[Ids], Field(fail_fast=True)],
    one_of("a string, an array of strings, an array of token ids, or an array of arrays of token ids"),
]
Stop = Annotated[
    str | Annotated[list[str], Field(max_length=MAX_STOPS)],
    one_of(f"a string or an array of at most {MAX_STOPS} strings"),
]


ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$"


class Strict(BaseModel):
    """Types are taken as they are: ``"5"`` is no number."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class Ignored(Strict):
    """Fields of OpenAI's that mean nothing to a server of one's own."""

    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class StreamOptions(Strict):
    """How a stream is sent."""

    include_usage: bool = Field(False, description="Send what the request took in a last chunk.")
    include_obfuscation: bool | None = Field(None, description="Read and ignored.")


class Guidance(Strict):
    """Rules that the answer follows, of this server's own; at most one."""

    guided_json: dict[str, Any] | str | None = Field(None, description="A JSON schema.")
    guided_regex: str | None = Field(None, description="A regular expression for the whole answer.")
    guided_grammar: str | None = Field(None, description="A grammar in Lark's or llama.cpp's notation.")
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="The answer is one of these."
    )
    guided_verse: dict[str, Any] | str | None = Field(None, description="A Chinese verse form.")


class Sampling(Ignored, Guidance):
    """What completions and chat have in common."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Share | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Ours from here on.
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 and -1 keep every token.")
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = Field(None, description="Write on past end tokens.")
    include_stop_str_in_output: bool | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Seconds from arrival; what there is by then is the answer."
    )


class CompletionRequest(Sampling):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: str | None = None
    add_special_tokens: bool = Field(
        True, description="Put the token that begins a document before a text prompt."
    )
    parse_special: bool = Field(True, description="Read names of special tokens in a text as those tokens.")


class EmbeddingRequest(Ignored):
    """Body of ``POST /v1/embeddings``."""

    model: str
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None


class AdapterRequest(Strict):
    """Body of ``POST /v1/adapters``."""

    name: Annotated[str, Field(pattern=ADAPTER_NAME)] = Field(description="What requests call it.")
    path: str | None = Field(
        None, description="Its folder in the server's --adapter-folder; null is its name."
    )


class TokenizeRequest(Strict):
    """Body of ``POST /v1/tokenize``."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    parse_special: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """Body of ``POST /v1/detokenize``."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
    skip_special_tokens: bool = False
