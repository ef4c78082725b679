"""`jaxpaged bench serve`: what is asked and when, what a server that answers by the clock is measured at, and ours."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from running_server import running
from tiny_chat_model import write_chat_model

from jaxpaged.__main__ import main
from jaxpaged.bench import workload
from jaxpaged.bench.serving import Answer, summary


def bench(*flags):
    return main(["bench", "serve", "--disable-tqdm", *map(str, flags)])


# What is asked


def test_arrivals_are_a_poisson_process_of_the_rate_or_bursts():
    poisson, bursts = (np.diff(workload.arrivals(20_000, 50.0, burstiness, 0)) for burstiness in (1.0, 0.25))
    assert poisson.mean() == pytest.approx(1 / 50, rel=0.03) and bursts.mean() == pytest.approx(1 / 50, rel=0.05)
    assert poisson.std() == pytest.approx(1 / 50, rel=0.05) and bursts.std() == pytest.approx(2 / 50, rel=0.05)
    assert workload.arrivals(3, float("inf"), 1.0, 0) == [0.0] * 3 and workload.arrivals(9, 1.0, 1.0, 0)[0] == 0


def test_prompts_have_their_lengths_and_share_what_they_shall():
    texts = [text.split() for text in workload.prompts([5, 6, 7, 8], seed=0, prefix_len=10, num_prefixes=2)]
    assert [len(words) for words in texts] == [15, 16, 17, 18]
    assert texts[0][:10] == texts[2][:10] != texts[1][:10] == texts[3][:10]
    assert len({tuple(words[10:]) for words in texts}) == 4


def test_lengths_are_those_of_conversations():
    means = np.mean(workload.conversations("alpaca", 5_000, 2048, 0), axis=0)
    np.testing.assert_allclose(means, (19, 58), rtol=0.1)
    spread = np.asarray(workload.uniform(100, 10, 0.2, 500, 0))
    assert (spread.min(0), spread.max(0)) == (pytest.approx((80, 8)), pytest.approx((120, 12)))


def test_a_trace_is_replayed_from_its_first_arrival(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrival,input,output,who\n7.5,3,4,a\n7,1,2,b\n9,5,6,c\n")
    times, lengths = workload.trace(path, 2)
    assert times == [0.0, 0.5] and lengths == [(1, 2), (3, 4)]


# What is measured


@contextmanager
def scripted(pieces, status=200, chunked=True):
    """A server that answers each request with pieces of a body, each after some seconds."""
    asked = []

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split()[0]) if b"POST" in head else 0
        asked.append(json.loads(await reader.readexactly(length)) if length else head.decode())
        writer.write(b"HTTP/1.1 %d X\r\n%s\r\n" % (status, b"Transfer-Encoding: chunked\r\n" * chunked))
        for seconds, piece in pieces:
            await asyncio.sleep(seconds)
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
        writer.write(b"0\r\n\r\n" * chunked)
        writer.close()

    started, found = threading.Event(), {}

    async def serve():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        found.update(port=server.sockets[0].getsockname()[1], loop=asyncio.get_running_loop(), end=asyncio.Event())
        started.set()
        async with server:
            await found["end"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(10)
    try:
        yield found["port"], asked
    finally:
        found["loop"].call_soon_threadsafe(found["end"].set)
        thread.join(10)


def event(text=None, usage=None):
    choices = [] if text is None else [{"index": 0, "text": text}]
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"


STREAM = [
    (0.06, event("a")),
    (0.03, event("b") + b": a comment\n\nda"),
    (0.03, event("c")[2:]),
    (0, event(usage={"prompt_tokens": 7, "completion_tokens": 5}) + b"data: [DONE]\n\n"),
]


@pytest.mark.parametrize("chunked", [True, False])
def test_a_server_is_measured_by_the_clock(tmp_path, capsys, chunked):
    """Text after 60, 90 and 120 ms; 5 tokens, as the server says, so 60 ms for the four after the first."""
    with scripted(STREAM, chunked=chunked) as (port, asked):
        how = ["--port", port, "--model", "it", "--num-prompts", 6, "--max-concurrency", 2, "--save-detailed"]
        where = ["--result-dir", tmp_path, "--result-filename", "out.json", "--goodput", "ttft:59", "--num-warmups", 0]
        assert bench(*how, *where, "--ignore-eos", "--extra-body", '{"top_p": 0.5}') == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["completed"], found["failed"]) == (6, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (42, 30)
    for name, milliseconds in {"ttft": 60, "itl": 30, "tpot": 15, "e2el": 120}.items():
        assert milliseconds <= found[f"median_{name}_ms"] < milliseconds + 25, name
    assert 0.36 <= found["duration"] < 0.9, "three pairs, one after the other"
    assert found["request_goodput"] == 0 < found["request_throughput"]
    assert [len(gaps) for gaps in found["itls"]] == [2] * 6
    assert asked[0]["stream"] and asked[0]["ignore_eos"] and asked[0]["top_p"] == 0.5
    assert asked[0]["stream_options"] == {"include_usage": True}
    out = capsys.readouterr().out
    assert "generated tokens/s" in out and "p99" in out


def test_goodput_counts_who_met_every_limit():
    def answer(*times):
        return Answer(1.0, 3, len(times), [1.0 + t for t in times], 1.0 + times[-1])

    answers = [answer(0.1, 0.2, 0.3), answer(0.3, 0.4), answer(0.1, 0.5), answer(0.1, 0.2), Answer(1.0, error="x")]
    limits = {"ttft": 0.2, "itl": 0.15}
    found = summary(answers, 2.0, limits, [50.0])
    assert found["request_goodput"] == 1.0 and found["request_throughput"] == 2.0 and found["failed"] == 1
    assert found["p50_ttft_ms"] == pytest.approx(100) and found["mean_itl_ms"] == pytest.approx(160)
    assert summary([Answer(0.0, error="x")], 1.0, {}, [99.0])["mean_ttft_ms"] is None


@pytest.mark.parametrize(
    ("pieces", "status", "message"),
    [
        ([(0, b'{"error": "too many"}')], 429, 'answered 429: {"error": "too many"}'),
        ([(0, b'data: {"error": {"message": "died"}}\n\n')], 200, "the stream ended with an error"),
        ([(0, b"data: {]\n\n")], 200, "what is no JSON"),
        ([(0, b"data: [DONE]\n\n")], 200, "held no text"),
    ],
)
def test_failures_are_told_and_counted(capsys, pieces, status, message):
    with scripted(pieces, status) as (port, _):
        assert bench("--port", port, "--model", "it", "--num-prompts", 2, "--num-warmups", 0) == 1
        assert message in capsys.readouterr().out
        assert bench("--port", port, "--model", "it", "--num-prompts", 2) == 2
        assert "does not answer a first request" in capsys.readouterr().err


def test_our_own_server_under_load(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text("arrival,input,output\n" + "".join(f"{i / 100},{3 + i},{2 + i % 3}\n" for i in range(12)))
    with running(write_chat_model(tmp_path / "model")) as server:
        url = ["--base-url", server.url, "--ignore-eos"]
        trace = ["--dataset-name", "trace", "--dataset-path", path, "--save-result", "--result-dir", tmp_path]
        assert bench(*url, *trace, "--result-filename", "out.json", "--plot", tmp_path / "out.png") == 0
        asked = ["--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", 40]
        sizes = ["--prefix-repetition-suffix-len", 3, "--prefix-repetition-output-len", 4]
        before = server.inner.stats().prefix_cache_hits
        chat = ["--endpoint", "/v1/chat/completions", "--num-prompts", 9, "--prefix-repetition-num-prefixes", 1]
        assert bench(*url, *asked, *sizes, *chat, "--request-rate", 200) == 0
        assert server.inner.stats().prefix_cache_hits - before > 9 * 40
        assert server.pages_held() == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["completed"], found["model_id"], found["total_output_tokens"]) == (12, "tiny", 36)
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--request-rate", 0], "--request-rate is 0; it must be above 0"),
        (["--max-concurrency", 0], "--max-concurrency is 0; it must be at least 1"),
        (["--dataset-name", "trace"], "--dataset-path FILE.csv belong together"),
        (["--dataset-name", "trace", "--dataset-path", "x", "--request-rate", 2], "a trace says when requests come"),
        (["--goodput", "speed:3"], "'speed:3'; known: ttft, tpot, itl, e2el"),
        (["--goodput", "ttft"], "it must be as in ttft:500"),
        (["--metric-percentiles", "x"], "numbers from 0 to 100"),
        (["--base-url", "localhost:8000"], "it must be as in http://localhost:8000"),
        (["--port", "1"], "does not say which models it has"),
        (["--dataset-name", "random", "--random-output-len", 0], "must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_one_line(capsys, flags, message):
    assert bench(*flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input,output\n1,2\n", "has no column 'arrival'"),
        ("arrival,input,output\n0,x,2\n", "line 2: arrival must be a number"),
        ("arrival,input,output\n0,1,2\n1,0,2\n", "line 3: arrival is 1.0, input 0"),
        ("arrival,input,output\n", "has no rows"),
    ],
)
def test_a_broken_trace_names_the_line(tmp_path, capsys, text, message):
    (tmp_path / "t.csv").write_text(text)
    assert bench("--dataset-name", "trace", "--dataset-path", tmp_path / "t.csv") == 2
    assert message in capsys.readouterr().err
