"""An engine that computes nothing: a step gives every request a token, at a chosen pace. What is left is the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

from served import Served, serving

from jaxpaged import AsyncEngine, EngineConfig, SamplingParams
from jaxpaged.engine.engine import Engine
from jaxpaged.outputs import CompletionOutput, FinishReason, RequestOutput

_WORDS = (" the", " quick", " brown", " fox", " says", " \u201cno\u201d", ",\n")


class Seats:
    """Who runs and who waits: of each request its prompt, completions and tokens left."""

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.running: dict[str, list[Any]] = {}
        self.waiting: dict[str, list[Any]] = {}

    @property
    def num_running(self) -> int:
        """Requests with a seat."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Requests without."""
        return len(self.waiting)


class FakeEngine:
    """As much of an `Engine` as `AsyncEngine` uses."""

    def __init__(self, max_num_seqs: int, steps_per_s: float) -> None:
        self.config = EngineConfig(max_num_seqs=max_num_seqs)
        self.tokenizer = None
        self.max_model_len = 1 << 20
        self.spec = SimpleNamespace(vocab_size=1000, dim=8)
        self.runner = SimpleNamespace(is_compiling=False)
        self.is_sleeping = False
        self.shards = Seats(max_num_seqs)
        self.adapters: list[str] = []
        self._period, self._next = 1 / steps_per_s, 0.0

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has work."""
        return bool(self.shards.running or self.shards.waiting)

    def encode(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """Prompts are token ids here."""
        return prompt

    def grammar(self, params: SamplingParams) -> None:
        """There is none."""

    def list_loras(self) -> list[Any]:
        """No adapters."""
        return []

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams, **options: Any) -> None:
        """It runs once there is a seat."""
        self.shards.waiting[request_id] = [prompt, params.n, params.max_tokens or 16]

    def abort(self, request_id: str) -> bool:
        """Forget it."""
        queues = self.shards.running, self.shards.waiting
        return any(queue.pop(request_id, None) is not None for queue in queues)

    def step(self) -> list[RequestOutput]:
        """One token for everybody with a seat, no sooner than the pace has it; a late step is not made up for."""
        now = time.perf_counter()
        if self._next > now:
            time.sleep(self._next - now)
        self._next = max(self._next, now) + self._period
        outputs, running, waiting = [], self.shards.running, self.shards.waiting
        while waiting and len(running) < self.shards.max_num_seqs:
            request_id = next(iter(waiting))
            running[request_id] = waiting.pop(request_id)
        for request_id, state in list(running.items()):
            prompt, n, left = state
            state[2] -= 1
            word = _WORDS[left % len(_WORDS)]
            reason: FinishReason | None = None if left > 1 else "length"
            made = [CompletionOutput(i, word, [left], finish_reason=reason) for i in range(n)]
            outputs.append(RequestOutput(request_id, None, prompt, made, finished=left == 1))
            if left == 1:
                del running[request_id]
        return outputs


@contextmanager
def fake_server(max_num_seqs: int, steps_per_s: float, max_num_queued: int | None = None) -> Iterator[Served]:
    """The real HTTP layer over it."""
    engine = cast(Engine, FakeEngine(max_num_seqs, steps_per_s))
    with serving(AsyncEngine(engine, max_num_queued_requests=max_num_queued)) as served:
        yield served
