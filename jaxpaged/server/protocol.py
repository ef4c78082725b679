"""What clients may send: OpenAI's fields and vLLM's further ones, with their types and the server's own limits.

null means a field was left out. Fields that would change the answer and are not served are refused, unless their value
asks for nothing; fields that nobody knows are ignored, as other servers do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from jaxpaged.errors import RequestError
from jaxpaged.outputs import Pooling
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.server.forms import form_of

MAX_N = 128
MAX_PROMPTS = 1_024
MAX_ENTRIES = {"stop": 64, "stop_token_ids": 1_024, "bad_words": 256, "logit_bias": 1_024}
"""Each entry costs every step a little of the host's time, which all requests share."""
MAX_STOP_CHARACTERS = 4_096

SAME_NAMES = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "min_tokens", "stop", "stop_token_ids", "bad_words", "allowed_token_ids", "ignore_eos"),
    *("skip_special_tokens", "include_stop_str_in_output"),
)
"""Fields that SamplingParams calls by the same names."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Unserved(msgspec.Struct, kw_only=True):
    """Known to OpenAI or vLLM, and not served here but where a request `serves` them."""

    serves: ClassVar[tuple[str, ...]] = ()

    suffix: Any = None
    functions: Any = None
    function_call: Any = None
    tools: Any = None
    tool_choice: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None
    use_beam_search: Any = None
    logits_processors: Any = None
    prompt_embeds: Any = None
    echo: Any = None
    chat_template: Any = None
    thinking_token_budget: Any = None


ASKS_NOTHING = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
"""Values of unserved fields that change nothing, besides null, false and what is empty."""


class Generation(Unserved, kw_only=True):
    """The fields that both ways to complete share."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    @property
    def asked_tokens(self) -> int | None:
        """How long the client wants an answer to be at most."""
        return self.max_tokens


class CompletionRequest(Generation, kw_only=True):
    """POST /v1/completions."""

    serves: ClassVar[tuple[str, ...]] = ("echo",)

    best_of: int | None = None
    prompt: str | list[Any]  # text, texts, token ids or lists of them: told apart by `completion_prompts`
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class ChatRequest(Generation, kw_only=True):
    """POST /v1/chat/completions."""

    serves: ClassVar[tuple[str, ...]] = ("tools", "tool_choice")

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def asked_tokens(self) -> int | None:
        """OpenAI's newer name goes first."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class ResponseReasoning(msgspec.Struct, kw_only=True):
    """How much is to be thought; what is, is given as it is, whatever summary is asked for."""

    effort: Effort | None = None
    summary: Any = None
    generate_summary: Any = None


class ResponseText(msgspec.Struct, kw_only=True):
    """The form of a response's text."""

    format: Any = None
    verbosity: Any = None


class ResponseRequest(Generation, kw_only=True):
    """POST /v1/responses."""

    serves: ClassVar[tuple[str, ...]] = ("tools", "tool_choice")

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    text: ResponseText | None = None
    metadata: dict[str, str] | None = None
    truncation: str | None = None
    store: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None
    reasoning: ResponseReasoning | None = None
    max_tool_calls: Any = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def asked_tokens(self) -> int | None:
        """By the name that it has here."""
        return self.max_output_tokens


class Embedding(msgspec.Struct, kw_only=True):
    """The fields that all share that embed texts."""

    model: str | None = None
    user: str | None = None
    pooling: Pooling | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    truncate_prompt_tokens: int | None = None


class EmbeddingRequest(Embedding, kw_only=True):
    """POST /v1/embeddings."""

    input: str | list[Any]  # as a completion's prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None


class ScoreRequest(Embedding, kw_only=True):
    """POST /v1/score."""

    text_1: str | list[Any]  # as a completion's prompt
    text_2: str | list[Any]


class RerankRequest(Embedding, kw_only=True):
    """POST /v1/rerank."""

    query: str
    documents: list[str]
    top_n: int | None = None  # 0: all


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class LoadLoRARequest(msgspec.Struct, kw_only=True):
    """POST /v1/load_lora_adapter: a folder on the server's side."""

    lora_name: str
    lora_path: str


class UnloadLoRARequest(msgspec.Struct, kw_only=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None


R = TypeVar("R")


def decode(body: bytes, kind: type[R]) -> R:
    """The request in a body. Raises RequestError that names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise RequestError(f"the request is malformed: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def sampling_params(
    request: Generation, defaults: Mapping[str, Any], *, max_tokens: int | None, **given: Any
) -> SamplingParams:
    """The parameters of a request, then the server's `defaults`; `given` are those whose meaning differs between
    endpoints. Raises RequestError.
    """
    refuse_unserved(request)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is given but stream is not true; set it, or leave stream_options out")
    for name, number in (("n", request.n), ("best_of", given.get("best_of"))):
        if number is not None and number > MAX_N:
            raise RequestError(f"{name} is {number:,}; it must be a whole number from 1 to {MAX_N}")
    for name, most in MAX_ENTRIES.items():
        value = getattr(request, name)
        if isinstance(value, Collection) and not isinstance(value, str) and len(value) > most:
            raise RequestError(f"{name} has {len(value):,} entries; it may have at most {most:,}")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        raise RequestError(f"stop has {sum(map(len, stops)):,} characters; it may have at most {MAX_STOP_CHARACTERS:,}")
    fields = {name: value for name in SAME_NAMES if (value := getattr(request, name)) is not None}
    if not fields.get("stop"):  # clients send an empty text for none
        fields.pop("stop", None)
    if request.logit_bias:
        fields["logit_bias"] = {_token_id(token): bias for token, bias in request.logit_bias.items()}
    form = given.pop("structured_outputs", None)
    asked = form_of(request)
    if form is not None and asked is not None:
        raise RequestError("tool_choice and a form of the answer are given; give 1 of them")
    fields["structured_outputs"] = form or asked
    if max_tokens is not None:
        fields["max_tokens"] = max_tokens
    return SamplingParams(**{"max_tokens": None} | dict(defaults) | fields | given)


def refuse_unserved(request: Unserved) -> None:
    """Raises RequestError for the first field that asks for what is not served."""
    for name in Unserved.__struct_fields__:
        value = getattr(request, name)
        if name not in request.serves and value and value not in ASKS_NOTHING.get(name, ()):
            raise RequestError(f"{name} is not served; leave it out")


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise RequestError(f"logit_bias names token {text[:40]!r}; token ids are whole numbers")
    return int(text)
