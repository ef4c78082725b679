"""Programs that people point at such a server, each in an environment of its own: what they get is the engine's.

OpenAI's own client, which the other tests of the server use, is not among them.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from running_server import running
from tiny_chat_model import TEMPLATE, write_chat_model

from jaxpaged import LLM

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("JAXPAGED_CLIENTS", ROOT / ".venv-clients")) / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"needs {PYTHON}: `make test-clients` installs the clients and runs"
    ),
]
CONVERSATION = [{"role": "system", "content": "12"}, {"role": "user", "content": "ban"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("asked") / "model")


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, chat_template=TEMPLATE + "{% if tools %}{{ tools | tojson }}{% endif %}") as server:
        yield server
        assert server.pages_held() == 0


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, warmup=False, num_pages=129, page_size=4)


def ask(script, *arguments, module=None):
    """What a client prints, as JSON."""
    how = [str(ROOT / "tests" / "clients" / script)] if module is None else ["-m", module]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OPENAI_API_KEY")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LANGSMITH_TRACING": "false"}
    command = [str(PYTHON), *how, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("[" if module else "{") :])


def answer(server, path, **body):
    found = server.post(path, temperature=0, max_tokens=6, **body).json()["choices"][0]
    return found["text"] if "text" in found else found["message"]["content"]


def test_langchain(server, llm):
    found = ask("ask_langchain.py", server.url)
    chat = answer(server, "/v1/chat/completions", messages=CONVERSATION)
    assert {found[name] for name in ("chat", "streamed", "responses", "responses_streamed")} == {chat}
    assert found["together"] == [chat] * 6
    assert found["formed"] in ({"name": "banana"}, {"name": "12"})
    for name in ("called", "called_streamed"):
        (call,) = found[name]
        assert call["name"] == "eat" and call["args"] in ({"name": "banana"}, {"name": "12"})
    assert found["num_pieces"] > 3, "arguments come piece by piece"
    assert found["completion"] == answer(server, "/v1/completions", prompt="banana")
    assert found["usage"]["output_tokens"] == found["stream_usage"]["output_tokens"] == 6
    assert found["usage"]["input_tokens"] == found["stream_usage"]["input_tokens"] == len(llm.encode_chat(CONVERSATION))
    np.testing.assert_allclose(found["embeddings"], llm.embed(["ban", "banana 12"], use_tqdm=False), atol=1e-5)
    np.testing.assert_allclose(found["query"], found["embeddings"][0], atol=1e-5)


def test_lm_eval(server, llm, tmp_path):
    """It finds the tokenizer at the server, sends token ids, and adds up the logprobs of each choice."""
    found = ask("ask_lm_eval.py", server.url, tmp_path)
    encode, right = llm.tokenizer.encode, 0
    for document, sample in zip(found["documents"], found["choices"]["samples"], strict=True):
        contexts = [encode(document["question"])] * len(document["choices"])
        # A space before a choice belongs to it, one without gets one: lm-eval's target_delimiter.
        texts = [document["question"] + " " + choice for choice in document["choices"]]
        completions = [encode(text)[len(contexts[0]) :] for text in texts]
        expected = [float(scores.sum()) for scores in llm.score(contexts, completions)]
        np.testing.assert_allclose([float(resp[0][0]) for resp in sample], expected, atol=1e-3)
        right += int(np.argmax(expected)) == document["answer"]
    assert found["choices"]["results"]["acc,none"] == pytest.approx(right / 3)
    for name, path in (("answers", "/v1/completions"), ("chat", "/v1/chat/completions")):
        for document, sample in zip(found["documents"], found[name]["samples"], strict=True):
            text = document["question"]
            asked = {"messages": [{"role": "user", "content": text}]} if name == "chat" else {"prompt": text}
            stop = {"stop": ["\n\n"], "max_tokens": 5, "temperature": 0}
            reply = server.post(path, **asked, **stop).json()["choices"][0]
            assert sample == [[reply["text"] if name == "answers" else reply["message"]["content"]]]


def test_locust(server):
    users = ["-u", 12, "-r", 12, "-t", "4s", "--host", server.url]
    stats = ask("", "-f", ROOT / "tests/clients/ask_locust.py", "--headless", "--json", *users, module="locust")
    assert {one["name"]: one["num_failures"] for one in stats} == dict.fromkeys(
        ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"), 0
    )
    assert sum(one["num_requests"] for one in stats) >= 36
