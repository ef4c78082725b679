"""What a server must outlive: clients that vanish, crawl or flood, and an operating system that withholds."""

from __future__ import annotations

import asyncio

from jaxpaged.outputs import CompletionOutput, RequestOutput
from jaxpaged.server.inbox import MAX_WAITING, Inbox

# Readers


def output(request_id: str, token: int, last: int) -> RequestOutput:
    made = [CompletionOutput(i, f"{token},", [token], weight_versions=[0], logprobs=[{token: -1.0}]) for i in range(2)]
    if token == last:
        made = [CompletionOutput(c.index, c.text, c.token_ids, None, c.logprobs, [0], "stop", "x") for c in made]
    return RequestOutput(request_id, None, [1], made, finished=token == last)


def test_reader_far_behind_gets_several_outputs_in_one_and_misses_nothing():
    async def story():
        inbox, texts, ends = Inbox(), {"a": "", "b": ""}, []
        for token in range(500):
            inbox.put(output("a", token, 499))
            inbox.put(output("b", token, 499))
        num_waiting = 0
        while inbox.has_output:
            got = await inbox.get()
            first, second = got.outputs
            assert (first.text, first.token_ids) == (second.text, second.token_ids)
            assert [token for entry in first.logprobs for token in entry] == first.token_ids
            assert len(first.weight_versions) == len(first.token_ids)
            texts[got.request_id] += first.text
            num_waiting += 1
            ends += [(got.request_id, first.finish_reason, first.stop_reason)] if got.finished else []
        assert num_waiting == MAX_WAITING
        assert set(texts.values()) == {"".join(f"{token}," for token in range(500))}
        assert sorted(ends) == [("a", "stop", "x"), ("b", "stop", "x")]
        inbox.put(output("a", 7, 8))
        assert (await inbox.get()).outputs[0].token_ids == [7], "nothing of it stays"

    asyncio.run(story())


def test_late_cumulative_outputs_make_earlier_ones_superfluous():
    async def story():
        inbox = Inbox(holds_deltas=False)
        for length in range(1, 301):
            inbox.put(RequestOutput("a", None, [1], [CompletionOutput(0, "x" * length, [0] * length)]))
        lengths = []
        while inbox.has_output:
            lengths.append(len((await inbox.get()).outputs[0].text))
        assert len(lengths) == MAX_WAITING and lengths == sorted(lengths) and lengths[-1] == 300

    asyncio.run(story())
