"""Answers of a given form: grammars compiled (llguidance), kept, and followed token by token. numpy only.

A grammar is tried in a process of its own first, which is ended after five seconds or a gigabyte: a few lines of JSON
schema can ask for any amount of either. Each step of a matcher is bounded by the limits below.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import tokenizers

from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import QueueFullError, RequestError
from jaxpaged.structured_outputs import StructuredOutputsParams

TIME_LIMIT = 5.0  # seconds to compile a grammar
MEMORY_LIMIT = 1 << 30  # bytes for that
CACHE_BYTES = 256 << 20
PATIENCE = 30.0  # seconds to wait until others' grammars are compiled

_LIMITS = {
    "max_lexer_states": 16_000,  # of 1 to 2 kB each, for every sequence
    "max_items_in_row": 10_000,  # an object of 2,000 optional properties has 8,000
    "verbose_errors": False,  # they would quote what others sent
}  # a step stays under 25 ms with expressions made to be slow
_BYTES_PER_GRAMMAR, _BYTES_PER_CHARACTER = 64 << 10, 128  # measured: 30 to 120 a character
_BLANKS = r"[ \n\t\r]{0,64}"
_TRIAL = Path(__file__).with_name("grammar_trial.py")


class GrammarError(RequestError):
    """A grammar that cannot be followed any further."""


class Matcher:
    """Where one sequence stands in its grammar, after the generated tokens that the host knows."""

    def __init__(self, state: Any, banned: np.ndarray, allowed: np.ndarray) -> None:
        self._state = state
        self._banned = banned  # bits of tokens that never may come: the end, where it is ignored
        self.allowed = allowed
        """A bit per token that may come next, as in `jaxpaged.model.sampling.restrict`: uint32 [words]."""

    def copy(self) -> Matcher:
        """Another one that stands here."""
        return Matcher(self._state.deep_copy(), self._banned, self.allowed)

    def without(self, banned: np.ndarray) -> Matcher:
        """This one, never to allow the tokens of these bits. Raises GrammarError where no other is allowed now."""
        matcher = Matcher(self._state, banned, self.allowed)
        matcher.look_ahead()
        return matcher

    def take(self, token: int) -> bool:
        """Go on by a token; True where the answer is complete and nothing can follow. Raises GrammarError."""
        if not self._state.consume_token(token):
            raise GrammarError(f"the grammar cannot go on: {_one_line(self._state.get_error())}")
        return bool(self._state.is_stopped())

    def look_ahead(self) -> None:
        """Find what is `allowed` next. Raises GrammarError, also where nothing is."""
        allowed = np.frombuffer(self._state.compute_bitmask(), np.uint32)[
            : self._banned.size
        ]  # it may have a spare word
        if self._state.is_error():
            raise GrammarError(f"the grammar cannot go on: {_one_line(self._state.get_error())}")
        self.allowed = allowed & ~self._banned
        if not self.allowed.any():
            raise GrammarError("the grammar allows no token of this model's vocabulary")


class Grammar:
    """A compiled form; any number of sequences may follow it."""

    def __init__(self, state: Any, ends: np.ndarray, *, may_end: bool) -> None:
        """`ends` has the bits of the end-of-sequence tokens, one of which may come unless they are made up. Raises
        GrammarError where nothing can begin.
        """
        self._ends = ends
        self._first = Matcher(state, np.zeros_like(ends) if may_end else ends, ends)
        self._first.look_ahead()  # here, since the first takes longest, and copies need not look again

    def matcher(self, *, may_end: bool) -> Matcher:
        """At the beginning; unless it `may_end`, no end-of-sequence token is ever allowed."""
        matcher = self._first.copy()
        return matcher if may_end else matcher.without(self._ends)


class Grammars:
    """Compiles grammars for one tokenizer and keeps those used last. Any thread may ask."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Collection[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids, self._vocab_size = eos_token_ids, vocab_size
        self._kept: OrderedDict[str, Grammar | str] = OrderedDict()  # or what is wrong with it; the latest last
        self._kept_bytes = 0
        self._library: Any = None
        self._vocabulary: Any = None
        self._trial: _Trial | None = None
        self._described: dict[str, Any] = {}
        self._ends, self._may_end = np.zeros(0, np.uint32), True
        self._looking, self._compiling = threading.Lock(), threading.Lock()

    def get(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar, compiled now or before. Raises RequestError that says why there is none, QueueFullError where
        others' take too long.
        """
        if self._tokenizer is None:
            raise RequestError("structured_outputs need a tokenizer, and the model came without one; leave them out")
        if self._library is None:
            self._library = _llguidance()
        source = self._source(params)
        found = self._look_up(source)
        if found is None:
            if not self._compiling.acquire(timeout=PATIENCE):
                raise QueueFullError(f"other grammars have been compiling for {PATIENCE:g} s; try again later")
            try:
                found = self._look_up(source) or self._keep(source, self._compile(source, self._tokenizer.backend))
            finally:
                self._compiling.release()
        if isinstance(found, str):
            raise RequestError(found)
        return found

    def _look_up(self, source: str) -> Grammar | str | None:
        with self._looking:
            if source in self._kept:
                self._kept.move_to_end(source)
            return self._kept.get(source)

    def _keep(self, source: str, made: Grammar | str) -> Grammar | str:
        with self._looking:
            self._kept[source] = made
            self._kept_bytes += _weight(source)
            while self._kept_bytes > CACHE_BYTES:
                self._kept_bytes -= _weight(self._kept.popitem(last=False)[0])
        return made

    def _compile(self, source: str, pipeline: tokenizers.Tokenizer) -> Grammar | str:
        if self._vocabulary is None:
            self._prepare(pipeline)
        if self._trial is None:
            self._trial = _Trial(self._described)
        try:
            error = self._trial.error(source)
        except RequestError:  # not kept: on another day there may be time
            self._trial = None
            raise
        if error:
            return f"structured_outputs cannot be compiled: {error}"
        limits = self._library.LLParserLimits(**_LIMITS)
        state = self._library.LLMatcher(self._vocabulary, source, limits=limits, log_level=0)
        try:
            return Grammar(state, self._ends, may_end=self._may_end)
        except GrammarError as error:
            return f"structured_outputs cannot be compiled: {error}"

    def _prepare(self, pipeline: tokenizers.Tokenizer) -> None:
        """The vocabulary as the library wants it, the model's padding included. Raises RequestError."""
        ends = sorted(token for token in self._eos_token_ids if token < pipeline.get_vocab_size())
        if not ends:  # the library needs one: a token that the model never says
            pipeline = tokenizers.Tokenizer.from_str(pipeline.to_str())
            pipeline.add_special_tokens(["<|no end|>"])
            ends, self._may_end = [pipeline.get_vocab_size() - 1], False
        size, text = max(self._vocab_size, pipeline.get_vocab_size()), pipeline.to_str()
        self._described = {"tokenizer": text, "vocab_size": size, "eos_token_ids": ends, "limits": _LIMITS}
        try:
            self._vocabulary = self._library.LLTokenizer(text, n_vocab=size, eos_token=ends)
        except Exception as error:  # the library raises what it likes
            raise RequestError(f"structured_outputs are not served with this tokenizer: {_one_line(error)}") from error
        self._ends = np.zeros(-(-size // 32), np.uint32)
        for token in ends:
            self._ends[token // 32] |= np.uint32(1 << token % 32)

    def _source(self, params: StructuredOutputsParams) -> str:
        """The form in the library's words."""
        make = self._library.LLMatcher
        if params.regex is not None:
            return str(make.grammar_from_regex(params.regex))
        if params.choice is not None:
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
            return str(make.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}"))  # a terminal: one automaton for all
        if params.grammar is not None:
            return str(make.grammar_from_lark(params.grammar))
        options: dict[str, Any] = {"whitespace_pattern": params.whitespace_pattern or _BLANKS}
        if params.disable_any_whitespace:
            options = {"whitespace_flexible": False}
        schema = '{"type": "object"}' if params.json_object else params.json
        # Neither may a schema change what its own keywords mean.
        options |= {"lenient": False, "coerce_one_of": False}
        try:
            return str(make.grammar_from_json_schema(schema, overrides=options))
        except ValueError as error:
            raise RequestError(f"structured_outputs cannot be compiled: {_one_line(error)}") from None


class _Trial:
    """The other process, one question at a time."""

    def __init__(self, described: dict[str, Any]) -> None:
        command = [sys.executable, "-P", str(_TRIAL), str(MEMORY_LIMIT)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._answers: SimpleQueue[str] = SimpleQueue()
        reader = threading.Thread(target=_pass_on, args=(self._process.stdout, self._answers), daemon=True)
        reader.start()
        self._end = weakref.finalize(self, _end, self._process, reader)
        self._described = described

    def error(self, source: str) -> str:
        """What is wrong with a grammar, "" for nothing. Raises RequestError, and ends, where it takes too much."""
        try:
            if self._described:
                self._ask(self._described, PATIENCE)
                self._described = {}
            return _one_line(self._ask(source, TIME_LIMIT))
        except Empty:
            reason = f"over {TIME_LIMIT:g} s"
        except (EOFError, BrokenPipeError):
            reason = f"over {MEMORY_LIMIT >> 20:,} MB"
        self._end()
        raise RequestError(f"structured_outputs take {reason} to compile; make them simpler")

    def _ask(self, question: Any, seconds: float) -> str:
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._answers.get(timeout=seconds)
        if not line:
            raise EOFError
        return str(json.loads(line))


def _pass_on(lines: Iterable[str], answers: SimpleQueue[str]) -> None:
    for line in lines:
        answers.put(line)
    answers.put("")


def _end(process: subprocess.Popen[str], reader: threading.Thread) -> None:
    """Whatever the process does."""
    process.kill()
    process.wait()
    reader.join()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise RequestError(
            "structured_outputs need llguidance, which is not installed; pip install 'jaxpaged[structured]'"
        ) from None


def _weight(source: str) -> int:
    """The bytes that a compiled grammar takes, about."""
    return _BYTES_PER_GRAMMAR + _BYTES_PER_CHARACTER * len(source)


def _one_line(error: object) -> str:
    text = " ".join(str(error).replace("<non-verbose/>", "").split())
    if text.startswith("NoExtension"):
        return "no text fits it"
    if len(text) <= 300:
        return text
    reason = re.search(r"error: (.+)", str(error))  # between two copies of what was sent
    return f"{text[:140]} ... {reason[1][:140] if reason else text[-140:]}"
