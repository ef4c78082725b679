"""Drafts: tokens guessed ahead, which one step checks together (speculative decoding, arXiv 2211.17192).

A step computes a sequence's last token and its draft behind it, and samples after each of them. Randomness belongs to
the position, so what is sampled after a token is what would have been sampled anyway: the draft's tokens that equal it
stand, the first that does not ends the step's yield, and no token depends on what was guessed. Each row is drawn as
without drafts; for guesses that are certain of themselves that is the acceptance rule of speculative sampling.

A wrong draft costs rows. So a sequence's drafts grow while they come true, shrink when they do not, and pause for
longer and longer while nothing of them does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import takewhile

from jaxpaged.config import EngineConfig
from jaxpaged.engine.request import Sequence
from jaxpaged.speculative_config import SpeculativeConfig

log = logging.getLogger("jaxpaged")

_FIRST_LENGTH = 2
_LONGEST_PAUSE = 15  # tokens
_CANDIDATES = 16  # earlier places that are compared
_MAX_TOKENS = 256  # of a step with drafts: about where a GPU's products stop waiting for weights, and a row costs


class Lookup:
    """Where each run of a few tokens stood in a growing list, the latest place first (prompt lookup decoding)."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._last: dict[tuple[int, ...], int] = {}  # a run -> the place after its latest end
        self._before: list[int] = []  # a place -> the one before it after the same run, or -1

    def draft(self, tokens: Seq[int], count: int, shortest: int, longest: int) -> list[int]:
        """`count` tokens from the place where most of the last ones stood before, `shortest` to `longest` of them; none
        where there is no such place. Where the list ends they go on as the repetition that they would then be.
        """
        place = self._find(tokens, shortest, longest)
        if place is None:
            return []
        period = len(tokens) - place
        return [tokens[place + index % period] for index in range(count)]

    def _find(self, tokens: Seq[int], shortest: int, longest: int) -> int | None:
        for place in range(len(self._before), len(tokens)):
            run = tuple(tokens[max(0, place - shortest) : place])
            self._before.append(self._last.get(run, -1))
            self._last[run] = place
        place = self._last.get(tuple(tokens[-shortest:]), -1)
        best, most = None, 0
        for _ in range(_CANDIDATES):
            if place < 0 or most == longest:
                break
            same = shortest
            while same < min(longest, place) and tokens[place - 1 - same] == tokens[-1 - same]:
                same += 1
            if same > most:
                best, most = place, same
            place = self._before[place]
        return best


@dataclass(slots=True)
class DraftState:
    """What the drafter knows of one sequence."""

    length: int  # of its next draft
    num_misses: int = 0  # drafts one after another of which nothing came true
    resume_at: int = 0  # tokens that it must have before it gets another
    lookup: Lookup = field(default_factory=Lookup)


def max_drafted_tokens(config: EngineConfig, max_num_batched_tokens: int) -> int:
    """Most tokens that a step with drafts computes, the drafts included; 0 where nothing is guessed."""
    if config.speculation is None:
        return 0
    wanted = config.max_num_seqs * (1 + config.speculation.num_speculative_tokens)
    return max(2, min(_MAX_TOKENS, wanted, max_num_batched_tokens))


class Drafter:
    """Guesses for the sequences of one scheduler, and counts what came true."""

    def __init__(self, config: SpeculativeConfig, vocab_size: int, max_tokens: int) -> None:
        """`max_tokens` is the most that a step with drafts may compute."""
        self.config = config
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.num_drafts = self.num_drafted_tokens = self.num_accepted_tokens = 0

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether it may get a draft once its tokens are known."""
        state = sequence.draft_state
        return sequence.may_draft and (state is None or sequence.num_tokens >= state.resume_at)

    def draft(self, sequence: Sequence, limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that may follow those of the sequence, which are all known."""
        config = self.config
        state = sequence.draft_state
        if state is None:
            state = sequence.draft_state = DraftState(min(_FIRST_LENGTH, config.num_speculative_tokens))
        count = min(limit, state.length)
        if count <= 0 or len(sequence.token_ids) < state.resume_at:
            return ()
        if config.method == "ngram":
            shortest, longest = config.prompt_lookup_min, config.prompt_lookup_max
            return tuple(state.lookup.draft(sequence.token_ids, count, shortest, longest))
        try:
            given = [int(token) for token in config.method(tuple(sequence.token_ids), count)][:count]
        except Exception:  # a guess is no reason to end anything
            log.exception("the draft function failed for request %r, which gets no more drafts", sequence.request_id)
            sequence.may_draft = False
            return ()
        return tuple(takewhile(lambda token: 0 <= token < self.vocab_size, given))

    def learn(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """How much of a draft came true."""
        self.num_drafts += 1
        self.num_drafted_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        state = sequence.draft_state
        if state is None:
            return
        if num_accepted == num_drafted:
            state.length = min(self.config.num_speculative_tokens, max(state.length, 2 * num_drafted))
        else:
            state.length = max(1, num_accepted)
        state.num_misses = 0 if num_accepted else state.num_misses + 1
        pause = min(_LONGEST_PAUSE, 2 ** max(0, state.num_misses - 1) - 1)
        state.resume_at = len(sequence.token_ids) + num_accepted + 1 + pause
