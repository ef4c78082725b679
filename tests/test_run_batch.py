"""`jaxpaged run-batch`: every line of a file is answered or refused in a line, and none that was written is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running_server import running
from tiny_chat_model import write_chat_model

from jaxpaged.__main__ import main
from jaxpaged.server import batch_file

ROOT = Path(__file__).parents[1]
SIZES = {"--max-num-seqs": "4", "--max-num-batched-tokens": "64", "--num-pages": "129", "--page-size": "4"}
SMALL = [word for flag in SIZES.items() for word in flag] + ["--no-warmup"]
NAMED = ["--served-model-name", "tiny"]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 5}
CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("batch") / "model")


def line(custom_id, url=COMPLETE, method="POST", **body):
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def run_batch(folder, source, target, *flags):
    command = ["run-batch", folder, "-i", source, "-o", target, "--disable-tqdm", *NAMED, *SMALL, *flags]
    return main([str(part) for part in command])


def read(path):
    return {entry["custom_id"]: entry for entry in map(json.loads, path.read_text().splitlines())}


def test_lines_are_answered_as_by_the_server_or_refused_one_by_one(folder, tmp_path, capsys):
    said = [{"role": "user", "content": "ban"}]
    good = {
        "chat": (CHAT, GREEDY | {"messages": said}),
        "text": (COMPLETE, GREEDY | {"prompt": "banana", "n": 2}),
        "vector": (EMBED, {"model": "tiny", "input": ["ban", "12"]}),
        "ranked": ("/v1/rerank", {"query": "ban", "documents": ["12", "ban"]}),
        "scored": ("/v1/score", {"text_1": "ban", "text_2": ["12", "ban"]}),
        "response": ("/v1/responses", {"model": "tiny", "input": "ban", "temperature": 0, "max_output_tokens": 5}),
    }
    many = {f"many {i}": (COMPLETE, GREEDY | {"prompt": "an" * (1 + i % 5)}) for i in range(30)}
    bad = {
        "hot": line("hot", prompt="x", temperature=-1),
        "other": line("other", model="gpt-4o", prompt="x"),
        "where": line("where", "/v1/files"),
        "stream": line("stream", **GREEDY, prompt="x", stream=True),
        "get": line("get", method="GET", **GREEDY, prompt="x"),
        "no body": '{"custom_id": "no body", "url": "/v1/completions"}',
    }
    lines = [line(name, url, **body) for name, (url, body) in (good | many).items()]
    lines[2:2] = [
        *bad.values(),
        "",
        "{",
        line("text", **GREEDY, prompt="again"),
        "\ud800".encode("utf-8", "replace").decode(),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    assert run_batch(folder, source, target) == 0
    assert f"{target}: 36 lines answered, 9 refused\n" in capsys.readouterr().out
    entries = [json.loads(text) for text in target.read_text().splitlines()]
    assert len(entries) == len({entry["id"] for entry in entries}) == 45
    found = {e["custom_id"]: e for e in entries if e["custom_id"] != "text" or e["error"] is None}
    with running(folder) as server:
        for name, (url, body) in (good | many).items():
            assert found[name]["error"] is None and found[name]["response"]["status_code"] == 200, name
            theirs, ours = server.http.post(url, json=body).json(), found[name]["response"]["body"]
            if name == "vector":
                np.testing.assert_allclose(ours["data"][1]["embedding"], theirs["data"][1]["embedding"], atol=1e-5)
            elif name in ("ranked", "scored"):
                best = ours["results"][0] if name == "ranked" else ours["data"][1]
                assert best["index"] == 1 and ours["usage"] == theirs["usage"]
            elif name == "response":
                assert ours["output"][0]["content"] == theirs["output"][0]["content"]
            else:
                assert ours["choices"] == theirs["choices"]
    assert (found["hot"]["response"]["status_code"], found["other"]["response"]["status_code"]) == (400, 404)
    assert "temperature is -1" in found["hot"]["response"]["body"]["error"]["message"]
    assert "POST /v1/files is not served" in found["where"]["error"]["message"]
    assert "stream is true" in found["stream"]["error"]["message"]
    assert "GET /v1/completions is not served" in found["get"]["error"]["message"]
    messages = [entry["error"]["message"] for entry in entries if entry["error"]]
    assert any("custom_id 'text' is that of line 2" in message for message in messages)
    assert all(message.startswith("line ") for message in messages) and len(messages) == 7


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_answered_and_the_next_one_answers_the_rest(folder, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = GREEDY | {"max_tokens": 300, "ignore_eos": True}
    source.write_text("\n".join(line(str(i), **asked, prompt="an" * (1 + i % 7)) for i in range(60)))
    command = [sys.executable, "-m", "jaxpaged", "run-batch", folder, "-i", source, "-o", target, *NAMED, *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not target.exists() or target.read_bytes().count(b"\n") < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    before = read(target)
    assert 5 <= len(before) < 60
    with target.open("a") as file:
        file.write('{"id": "batch_req_1", "custom_id": "59", "resp')  # as if killed while writing
    assert run_batch(folder, source, target) == 2
    assert "exists; remove it, or give --resume" in capsys.readouterr().err
    assert run_batch(folder, source, target, "--resume") == 0
    assert f"{60 - len(before)} lines answered, 0 refused, {len(before)} answered before" in capsys.readouterr().out
    after = read(target)
    assert set(after) == set(map(str, range(60))) and target.read_bytes().count(b"\n") == 60
    assert all(after[name] == before[name] for name in before)
    texts = {i % 7: after[str(i)]["response"]["body"]["choices"][0]["text"] for i in range(7)}
    assert all(e["response"]["body"]["choices"][0]["text"] == texts[int(name) % 7] for name, e in after.items())


def test_an_answer_is_in_the_file_before_anybody_is_told_of_it(folder, tmp_path):
    source, target, seen = tmp_path / "in.jsonl", tmp_path / "out.jsonl", []
    source.write_text("\n".join(line(str(i), **GREEDY, prompt="an") for i in range(9)))
    with running(folder) as server:

        def told():
            seen.append(target.read_bytes().count(b"\n"))

        counts = asyncio.run(batch_file.run(server.app, source, target, resume=False, told=told))
    assert seen == list(range(1, 10)) and counts == (9, 0, 0)


def test_a_dead_engine_ends_the_run_and_answers_nothing_wrongly(folder, tmp_path, capsys, monkeypatch, caplog):
    from jaxpaged import Engine

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(str(i), **GREEDY, prompt="an") for i in range(20)))
    steps = iter(range(6))
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (next(steps), step(self))[1])
    assert run_batch(folder, source, target) == 2
    assert "the engine failed" in capsys.readouterr().err
    assert all(e["response"]["status_code"] == 200 for e in read(target).values()) and len(read(target)) < 20


def test_answers_are_read_and_sampled_as_the_flags_say(folder, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3}')
    source.write_text(line("a", CHAT, messages=[{"role": "user", "content": "ban"}]))
    flags = ["--reasoning-parser", "deepseek_r1", "--generation-config", tmp_path]
    assert run_batch(folder, source, target, *flags) == 0
    body = read(target)["a"]["response"]["body"]
    assert body["usage"]["completion_tokens"] == 3 and body["choices"][0]["message"]["reasoning_content"]
    assert run_batch(folder, source, tmp_path / "no.jsonl", "--tool-call-parser", "xml") == 2
    assert "--tool-call-parser is 'xml'; known: hermes" in capsys.readouterr().err


def test_files_that_cannot_be_used_are_one_line(folder, tmp_path, capsys):
    assert run_batch(folder, tmp_path / "none.jsonl", tmp_path / "out.jsonl") == 2
    assert "cannot open" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text("")
    (tmp_path / "out.jsonl").write_text("")
    assert run_batch(folder, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 2
    assert capsys.readouterr().err.count("\n") == 1
