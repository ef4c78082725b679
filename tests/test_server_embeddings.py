"""/v1/embeddings: what OpenAI's own client gets is what `LLM.embed` says; and scores made of them."""

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


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_are_cosines_of_pairs_or_of_one_with_all(server, llm, path):
    vectors = llm.embed(TEXTS, use_tqdm=False)
    one = server.post(path, model="tiny", text_1=TEXTS[0], text_2=TEXTS).json()
    assert one["object"] == "list" and one["id"].startswith("score-") and one["model"] == "tiny"
    assert [(entry["index"], entry["object"]) for entry in one["data"]] == [(i, "score") for i in range(3)]
    np.testing.assert_allclose([entry["score"] for entry in one["data"]], vectors @ vectors[0], atol=1e-5)
    lengths = [len(llm.tokenizer.encode(text)) for text in TEXTS]
    assert one["usage"] == dict.fromkeys(("prompt_tokens", "total_tokens"), sum(lengths) + lengths[0])
    pairs = server.post(path, text_1=TEXTS[:2], text_2=[llm.tokenizer.encode(text) for text in TEXTS[1:]]).json()
    expected = (vectors[:2] * vectors[1:]).sum(-1)
    np.testing.assert_allclose([entry["score"] for entry in pairs["data"]], expected, atol=1e-5)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ordered_by_their_cosine_with_the_query(server, llm, path):
    asked = {"query": "banana", "documents": TEXTS, "pooling": "last", "request_id": "mine"}
    found = server.post(path, **asked).json()
    scores = llm.embed(TEXTS, "last", use_tqdm=False) @ llm.embed("banana", "last", use_tqdm=False)[0]
    order = np.argsort(-scores).tolist()
    assert order != [0, 1, 2] and [entry["index"] for entry in found["results"]] == order
    assert [entry["document"]["text"] for entry in found["results"]] == [TEXTS[place] for place in order]
    np.testing.assert_allclose([entry["relevance_score"] for entry in found["results"]], scores[order], atol=1e-5)
    assert found["id"] == "rerank-mine" and found["usage"]["total_tokens"] > 0
    for most, count in ((2, 2), (9, 3), (0, 3)):
        assert server.post(path, top_n=most, **asked).json()["results"] == found["results"][:count]


@pytest.mark.parametrize(
    ("path", "asked", "message"),
    [
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "an"]}, "text_1 has 2 texts and text_2 3; give as many"),
        ("/score", {"text_1": ["a", "b"], "text_2": "an"}, "text_1 has 2 texts and text_2 1"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2 is empty"),
        ("/score", {"text_1": "a"}, "text_2"),
        ("/rerank", {"query": "a", "documents": []}, "documents is empty"),
        ("/rerank", {"query": "a", "documents": ["a", [1]]}, "documents"),
        ("/rerank", {"query": "", "documents": ["a"]}, "the prompt is empty"),
        ("/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n is -1; it must be 1 or more"),
        ("/rerank", {"query": "a" * 20_000, "documents": ["a"]}, "max_model_len is 512"),
        ("/rerank", {"query": "a", "documents": ["a"], "request_id": ""}, "request_id has 0 characters"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_the_clients_fault(server, path, asked, message):
    answer = server.post(path, **asked)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


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
