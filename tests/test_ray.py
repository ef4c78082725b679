"""Ray, really started: replicas behind one address and a pool of workers, one of which is killed at work.

`make test-ray` installs Ray and runs this; elsewhere it is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tiny_chat_model import write_chat_model

from jaxpaged import LLM, SamplingParams
from jaxpaged.errors import ConfigError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: make test-ray"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_pages": 257, "page_size": 4, "warmup": False}
PORT = 18_433
REPLICA = "x-jaxpaged-replica"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("ray") / "model")


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # who is killed here, and when, the tests say
        import ray
        import ray.data

        root = str(Path(__file__).parents[1])
        environment = {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def address(cluster, model):
    from ray import serve

    from jaxpaged.integrations.ray_serve import build

    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    settings = SMALL | {"num_replicas": "2", "served_model_name": "tiny", "max_imbalance": 4}
    serve.run(build({"model": str(model)} | settings))
    yield f"http://127.0.0.1:{PORT}"
    serve.shutdown()


def processes(title):
    """Ids of this machine's processes that Ray has given this title."""
    found = subprocess.run(["pgrep", "--full", f"^ray::{title}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def ask(http, content, **more):
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0} | more
    return http.post("/v1/chat/completions", json=body)


def stream(http, index):
    """What became of one streamed request: (text, None) or (None, error object)."""
    body = {"prompt": f"request {index}", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return None, json.loads(answer.read())["error"] | {"status": answer.status_code}
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    if events[-1] != "[DONE]":
        return None, json.loads(events[-1])["error"]
    return "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1]), None


def replicas(http):
    """The names of those that answer now."""
    with ThreadPoolExecutor(16) as pool:
        return {r.headers[REPLICA] for r in pool.map(lambda i: ask(http, f"who are you {i}"), range(16))}


def test_a_conversation_returns_to_the_replica_that_holds_its_pages(address):
    with httpx.Client(base_url=address, timeout=60) as http:
        homes = {}
        for name in ("first", "second", "third", "fourth"):
            opening = [{"role": "user", "content": f"{name} conversation"}]
            answer = ask(http, "", messages=opening)
            assert answer.status_code == 200, answer.text
            homes[name] = answer.headers[REPLICA]
            later = ask(http, "", messages=[*opening, {"role": "assistant", "content": "!"}, *opening])
            assert later.headers[REPLICA] == homes[name]
            assert later.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
        assert len(replicas(http)) == 2


def test_errors_come_through_as_the_server_says_them(address):
    with httpx.Client(base_url=address, timeout=60) as http:
        refused = ask(http, "hello", temperature=-1)
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
        assert http.post("/v1/chat/completions", content=b"{").status_code in (400, 415)
        assert http.get("/metrics").status_code == 404
        assert http.get("/health").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_killed_replica_comes_back_and_every_streamed_request_is_answered_or_may_be_retried(address, model):
    num_requests = 200
    with httpx.Client(base_url=address, timeout=120, limits=httpx.Limits(max_connections=32)) as http:
        before = replicas(http)
        assert len(before) == 2
        with ThreadPoolExecutor(16) as pool:
            waiting = [pool.submit(stream, http, index) for index in range(num_requests)]
            while sum(w.done() for w in waiting) < num_requests // 4:
                time.sleep(0.02)
            killed = processes("ServeReplica:default:Replica")
            assert len(killed) == 2
            os.kill(killed[0], signal.SIGKILL)
            results = [w.result() for w in waiting]
        failed = [error for _, error in results if error]
        assert all(error["type"] in ("server_error", "rate_limit_error") for error in failed), failed
        assert all("try again" in error["message"] for error in failed), failed
        assert not [error for error in failed if "status" in error], failed  # what had not begun another one answered
        assert len(failed) <= 16  # no more than ran when it died
        llm = LLM(model, **SMALL)
        params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        expected = llm.generate([f"request {i}" for i in range(num_requests)], params, use_tqdm=False)
        for (text, error), output in zip(results, expected, strict=True):
            assert error is not None or text == output.outputs[0].text
        retried = [stream(http, index) for index, (_, error) in enumerate(results) if error]
        assert not [error for _, error in retried if error]
        deadline = time.monotonic() + 60
        while len(now := replicas(http)) < 2:
            assert time.monotonic() < deadline, now
            time.sleep(0.5)
        assert now != before


PROMPTS = [{"id": i, "prompt": f"prompt {i}"} for i in range(1000)]
PARAMS = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


def finished(folder):
    return [json.loads(line)[0] for path in folder.glob("rows-*.jsonl") for line in path.read_text().splitlines()]


def test_a_killed_worker_loses_no_row_and_none_is_answered_twice(cluster, model, tmp_path):
    from jaxpaged.integrations.ray_data import generate

    dataset = generate(
        cluster.data.from_items(PROMPTS, override_num_blocks=20),
        model,
        PARAMS,
        checkpoint=tmp_path,
        num_workers=2,
        batch_size=50,
        **SMALL,
    )
    with ThreadPoolExecutor(1) as pool:
        rows = pool.submit(dataset.take_all)
        while len(finished(tmp_path)) < 100 or len(workers := processes("MapWorker")) < 2:
            assert not rows.done(), rows.result()
            time.sleep(0.02)
        os.kill(workers[0], signal.SIGKILL)
        rows = rows.result()
    assert sorted(row["id"] for row in rows) == list(range(1000))
    counts = Counter(finished(tmp_path))
    assert len(counts) == 1000
    assert set(counts.values()) == {1}  # what was finished before the kill was not computed again
    some = sorted(rows, key=lambda row: row["id"])[::97]
    expected = LLM(model, **SMALL).generate([row["prompt"] for row in some], PARAMS, use_tqdm=False)
    for row, output in zip(some, expected, strict=True):
        assert (row["generated_text"], row["finish_reason"], row["error"]) == (output.outputs[0].text, "length", "")
        assert list(row["generated_token_ids"]) == output.outputs[0].token_ids


def test_a_job_run_again_goes_on_where_it_ended_and_refused_rows_say_why(cluster, model, tmp_path):
    from jaxpaged.integrations.ray_data import generate

    rows = [{"id": "long", "prompt": "x" * 2000}, {"id": "chat", "prompt": [{"role": "user", "content": "hello"}]}]
    chats, texts = (cluster.data.from_items(rows[i::2]) for i in (1, 0))
    first = generate(chats, model, PARAMS, checkpoint=tmp_path, **SMALL).take_all()
    assert (first[0]["finish_reason"], first[0]["error"]) == ("length", "")
    assert generate(chats, model, PARAMS, checkpoint=tmp_path, **SMALL).take_all()[0] == first[0]
    (refused,) = generate(texts, model, PARAMS, checkpoint=tmp_path, **SMALL).take_all()
    assert "2,000" in refused["error"] and refused["generated_text"] == ""
    assert sorted(finished(tmp_path)) == ["chat", "long"]
    with pytest.raises(ConfigError, match="no column question; name prompt_column, id_column"):
        generate(texts, model, PARAMS, checkpoint=tmp_path, prompt_column="question", **SMALL)
