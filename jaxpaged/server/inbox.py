"""Outputs of one or several requests on their way to one reader, who may be slow: what waits for it is bounded."""

from __future__ import annotations

import asyncio
from collections import deque

from jaxpaged.errors import EngineDeadError
from jaxpaged.outputs import CompletionOutput, RequestOutput

MAX_WAITING = 64
"""Outputs that wait apart. A reader further behind gets several in one, so that it costs the memory of its answer."""


class Inbox:
    """Belongs to the event loop in which it was made; `put` and `get` are called there."""

    def __init__(self, *, holds_deltas: bool = True) -> None:
        """`holds_deltas`: an output says what is new, and not all so far, which the next makes superfluous."""
        self.loop = asyncio.get_running_loop()
        self._holds_deltas = holds_deltas
        self._items: deque[RequestOutput | EngineDeadError] = deque()
        self._latest: dict[str, RequestOutput] = {}  # of each request the last that waits
        self._reader: asyncio.Future[None] | None = None

    @property
    def has_output(self) -> bool:
        """Whether `get` gives one without waiting."""
        return bool(self._items) and not isinstance(self._items[0], EngineDeadError)

    def put(self, item: RequestOutput | EngineDeadError) -> None:
        """Add an output, at the end or, where too many wait, to its request's last."""
        if isinstance(item, RequestOutput):
            latest = self._latest.get(item.request_id) if len(self._items) >= MAX_WAITING else None
            if latest is not None:
                _absorb(latest, item, self._holds_deltas)
                return
            self._latest[item.request_id] = item
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> RequestOutput:
        """The next output. Raises EngineDeadError where none will come any more."""
        while not self._items:
            self._reader = self.loop.create_future()
            await self._reader
        item = self._items.popleft()
        if isinstance(item, EngineDeadError):
            raise item
        if self._latest[item.request_id] is item:
            del self._latest[item.request_id]
        return item


def _absorb(earlier: RequestOutput, later: RequestOutput, are_deltas: bool) -> None:
    """Make one output of two."""
    outputs = [*later.outputs]
    if are_deltas:
        by_index = {completion.index: completion for completion in earlier.outputs}
        for completion in later.outputs:
            by_index[completion.index] = _joined(by_index.get(completion.index), completion)
        outputs = list(by_index.values())
    earlier.outputs, earlier.finished, earlier.metrics = outputs, later.finished, later.metrics
    earlier.prompt_logprobs, earlier.num_cached_tokens = later.prompt_logprobs, later.num_cached_tokens


def _joined(earlier: CompletionOutput | None, later: CompletionOutput) -> CompletionOutput:
    if earlier is None:
        return later
    earlier.text += later.text
    earlier.token_ids += later.token_ids
    earlier.weight_versions += later.weight_versions
    if later.logprobs is not None:
        earlier.logprobs = [*(earlier.logprobs or ()), *later.logprobs]
    earlier.cumulative_logprob = later.cumulative_logprob
    earlier.finish_reason, earlier.stop_reason = later.finish_reason, later.stop_reason
    return earlier
