"""How the tokens of one request are chosen and when they end. Names and defaults are vLLM's; checked once, here."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxpaged.errors import RequestError
from jaxpaged.logits_processor import LogitsProcessor
from jaxpaged.settings import Settings
from jaxpaged.structured_outputs import StructuredOutputsParams

MIN_TEMPERATURE = 0.01
"""A smaller temperature that is not 0 is raised to this, as in vLLM: logits divided by less overflow."""

MAX_TEMPERATURE = 1e6
"""A larger one is lowered to this, at which all tokens are equally likely: some are no numbers of the device."""

MAX_LOGIT_BIAS = 1e6
"""Any more decides nothing that this does not, and would end in logits that are not finite."""

_MAX_PENALTY = 1e6  # and its inverse the least: as above


@dataclass(frozen=True)
class SamplingParams(Settings):
    """One request's sampling parameters. Raises RequestError, naming field, value and range, where one is wrong.

    n                           completions of the prompt, each its own sequence
    presence_penalty            taken once from the logit of every token generated before
    frequency_penalty           taken from a token's logit as often as it was generated before
    repetition_penalty          above 1 makes tokens of prompt and answer less likely, below 1 more
    temperature                 the logits are divided by it; 0 is greedy
    top_p                       keep the fewest tokens whose probabilities reach this sum
    top_k                       keep this many most likely tokens; 0 or -1 keeps all
    min_p                       keep tokens at least this fraction as likely as the most likely one
    seed                        makes the tokens repeatable: alone, in any batch, after preemption
    stop                        text that ends the completion; one string or several, stored as a tuple
    stop_token_ids              tokens that end it besides the model's own end-of-sequence tokens
    bad_words                   texts that are never completed
    ignore_eos                  go on past the model's end-of-sequence tokens
    max_tokens                  most tokens to generate; None: up to the model's length
    min_tokens                  no stop string and no stop token ends the completion before so many tokens
    logprobs                    give the log probabilities of the sampled and of so many most likely tokens, at most 20
    prompt_logprobs             the same for the tokens of the prompt
    detokenize                  give text, not only token ids
    skip_special_tokens         leave special tokens out of the text
    include_stop_str_in_output  leave the stop string in the text
    logit_bias                  token id -> added to its logit
    allowed_token_ids           only these may be sampled
    best_of                     completions made, of which the n of the highest cumulative log probability are given in
                                the end, best first; None: n
    logits_processor            your own function on the logits, jittable, or a LogitsProcessor, which has a state
    structured_outputs          the form the answer must have: a StructuredOutputsParams, or its fields in a mapping
    """

    error: ClassVar[type[RequestError]] = RequestError

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    best_of: int | None = None
    logits_processor: LogitsProcessor | Callable[[Any, Any], tuple[Any, Any]] | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check every field and store it in its one form: sequences as tuples, numbers as int or float."""
        self._check_int("n", 1)
        self._check_float("presence_penalty", -2, 2)
        self._check_float("frequency_penalty", -2, 2)
        self._check_float("repetition_penalty", 1 / _MAX_PENALTY, _MAX_PENALTY)
        self._check_float("temperature", 0)
        self._check_float("top_p", 0, 1, above=True)
        self._check_int("top_k", -1)
        self._check_float("min_p", 0, 1)
        self._check_int("min_tokens", 0)
        for name, low in (("seed", None), ("best_of", 1), ("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0)):
            if getattr(self, name) is not None:
                self._check_int(name, low)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            self._check_bool(name)

        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of is {self.best_of:,} but n is {self.n:,}; raise it to n, or lower n")
        if self.temperature > 0:
            self._set("temperature", min(max(self.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens:,}; it must be at most max_tokens, {self.max_tokens:,}")

        self._set("stop", _texts("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        self._set("bad_words", _texts("bad_words", self.bad_words))
        self._set(
            "stop_token_ids", _token_ids("stop_token_ids", () if self.stop_token_ids is None else self.stop_token_ids)
        )
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty; name at least 1 token id, or leave it out")
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        if self.logits_processor is not None and not isinstance(self.logits_processor, LogitsProcessor):
            if not callable(self.logits_processor):
                raise RequestError(
                    f"logits_processor is {self.logits_processor!r}; it must be a function of (logits, state) that "
                    "gives (logits, state), or a LogitsProcessor"
                )
            self._set("logits_processor", LogitsProcessor(self.logits_processor))
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            if not isinstance(self.structured_outputs, Mapping):
                raise RequestError(
                    f"structured_outputs is {self.structured_outputs!r:.60}; it must be a StructuredOutputsParams"
                )
            self._set("structured_outputs", StructuredOutputsParams(**self.structured_outputs))
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need text; set detokenize=True or use stop_token_ids")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as stored: a tuple, empty where none was given."""
        return tuple(self.stop or ())

    @property
    def processor(self) -> LogitsProcessor | None:
        """`logits_processor` as stored."""
        return self.logits_processor if isinstance(self.logits_processor, LogitsProcessor) else None

    @property
    def form(self) -> StructuredOutputsParams | None:
        """`structured_outputs` as stored."""
        return self.structured_outputs if isinstance(self.structured_outputs, StructuredOutputsParams) else None

    @property
    def num_completions(self) -> int:
        """Sequences made of a request, of which `n` are given."""
        return self.best_of or self.n

    @property
    def ranks(self) -> bool:
        """True where some completions are left out in the end."""
        return self.num_completions > self.n

    @property
    def greedy(self) -> bool:
        """True where the most likely token is taken and nothing is drawn."""
        return self.temperature == 0


@dataclass(frozen=True)
class BeamSearchParams(Settings):
    """One beam search's parameters. Raises RequestError, naming field, value and range, where one is wrong.

    beam_width      continuations kept at every step, and hypotheses given in the end
    max_tokens      most tokens to generate
    length_penalty  a hypothesis' score is its log probability over its length to the power of this
    early_stopping  True: stop once beam_width hypotheses have ended; False: once the best beam, as long as it is now,
                    could not be among them; "never": once it could not at its best possible length
    ignore_eos      go on past the model's end-of-sequence tokens
    temperature     the logits are divided by it before they are scored; 0 and 1 leave them as they are
    """

    error: ClassVar[type[RequestError]] = RequestError

    beam_width: int
    max_tokens: int = 16
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    temperature: float = 0.0

    def __post_init__(self) -> None:
        """Check every field."""
        self._check_int("beam_width", 1)
        self._check_int("max_tokens", 1)
        self._check_float("length_penalty", -math.inf)
        self._check_float("temperature", 0)
        self._check_bool("ignore_eos")
        if self.early_stopping not in (True, False, "never"):
            raise RequestError(f"early_stopping is {self.early_stopping!r}; it must be True, False or 'never'")
        if self.temperature > 0:
            self._set("temperature", min(max(self.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE))


def _texts(name: str, given: Iterable[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise RequestError(f"{name} is {given!r}; it must be a list of strings")
    texts = tuple(given)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(f"{name} contains {text!r}; every entry must be a string of at least 1 character")
    return texts


def _token_ids(name: str, given: Iterable[int]) -> tuple[int, ...]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise RequestError(f"{name} is {given!r}; it must be a list of token ids")
    return tuple(_token_id(name, token) for token in given)


def _token_id(name: str, given: Any) -> int:
    if isinstance(given, bool) or not hasattr(given, "__index__") or operator.index(given) < 0:
        raise RequestError(f"{name} contains {given!r}; a token id is a whole number of at least 0")
    return operator.index(given)


def _biases(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise RequestError(f"logit_bias is {given!r}; it must map token ids to numbers")
    biases = {}
    for token, bias in given.items():
        if isinstance(bias, bool) or not hasattr(bias, "__float__") or not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias of token {token!r} is {bias!r}; it must be a number from {-MAX_LOGIT_BIAS:g} to "
                f"{MAX_LOGIT_BIAS:g}"
            )
        biases[_token_id("logit_bias", token)] = float(bias)
    return biases
