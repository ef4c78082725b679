"""/v1/embeddings: what OpenAI's own client gets is what `LLM.embed` says."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import openai
import pytest
from running_server import running
from tiny_chat_model import write_chat_model

from jaxpaged import LLM

TEXTS = ["ban", "banana 12", "an " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("embedded") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, warmup=False, num_pages=129, page_size=4)


@pytest.fixture(scope="module")
def server(folder):
    with running(folder) as server:
        yield server
        assert server.pages_held() == 0


@pytest.mark.parametrize("asked", [{}, {"encoding_format": "float"}])
def test_openais_client_gets_the_engines_vectors(server, llm, asked):
    """Left to itself it asks for base64."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="tiny", input=TEXTS, **asked)
        one = client.embeddings.create(model="tiny", input=TEXTS[1], **asked)
    vectors = np.asarray([entry.embedding for entry in answer.data], np.float32)
    np.testing.assert_allclose(vectors, llm.embed(TEXTS, use_tqdm=False), atol=1e-5)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(llm.tokenizer.encode(t)) for t in TEXTS)
    np.testing.assert_allclose(one.data[0].embedding, vectors[1], atol=1e-5)


def test_token_ids_pooling_and_length(server, llm):
    tokens = [llm.tokenizer.encode(text) for text in TEXTS]
    asked = {"input": tokens, "pooling": "last", "normalize": False, "dimensions": 32}
    answer = server.post("/v1/embeddings", **asked).json()
    expected = llm.embed(TEXTS, "last", normalize=False, use_tqdm=False)
    np.testing.assert_allclose([entry["embedding"] for entry in answer["data"]], expected, atol=1e-5)
    one = server.post("/v1/embeddings", input=tokens[1], pooling="last").json()["data"]
    np.testing.assert_allclose(one[0]["embedding"], expected[1] / np.linalg.norm(expected[1]), atol=1e-5)


def test_the_async_engine_embeds(server, llm):
    async def both():
        return await asyncio.gather(server.engine.embed(TEXTS[0]), server.engine.embed(TEXTS[2], "last"))

    mean, last = asyncio.run(both())
    np.testing.assert_allclose(mean, llm.embed(TEXTS[0], use_tqdm=False)[0], atol=1e-5)
    np.testing.assert_allclose(last, llm.embed(TEXTS[2], "last", use_tqdm=False)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dimensions": 8}, "dimensions is 8 but this model's embeddings have 32"),
        ({"input": []}, "input is empty"),
        ({"input": ""}, "the prompt is empty"),
        ({"input": ["a", [1]]}, "input mixes texts and token ids"),
        ({"input": [[999_999]]}, "999,999|999999"),
        ({"input": "a" * 20_000}, "max_model_len is 512"),
        ({"pooling": "max"}, "max"),
        ({"encoding_format": "int8"}, "int8"),
        ({"truncate_prompt_tokens": 513}, "it must be 1 to 512, or -1"),
    ],
    ids=str,
)
def test_what_cannot_be_embedded_is_the_clients_fault(server, asked, message):
    answer = server.post("/v1/embeddings", **({"input": "ban"} | asked))
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"]["message"]), answer.text
