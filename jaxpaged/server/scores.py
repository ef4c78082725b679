"""/v1/score and /v1/rerank: how alike texts are, as the cosine between their embeddings, in vLLM's forms."""

from __future__ import annotations

import time

import numpy as np

from jaxpaged.engine.embedding import unit_length
from jaxpaged.errors import RequestError
from jaxpaged.server.answers import Json
from jaxpaged.server.async_engine import AsyncEngine
from jaxpaged.server.embeddings import answer_name, embedded, usage_of, vector_of
from jaxpaged.server.exchange import Exchange
from jaxpaged.server.generation import Observer, completion_prompts
from jaxpaged.server.protocol import Embedding, RerankRequest, ScoreRequest
from jaxpaged.server.truncation import Prompts


async def score(exchange: Exchange, engine: AsyncEngine, request: ScoreRequest, model: str, observe: Observer) -> None:
    """Compare each text with its partner, or one with all of the others."""
    answer_id = answer_name("score", request)
    firsts, seconds = completion_prompts(request.text_1, "text_1"), completion_prompts(request.text_2, "text_2")
    if len(firsts) not in (1, len(seconds)):
        raise RequestError(
            f"text_1 has {len(firsts):,} texts and text_2 {len(seconds):,}; give as many of both, or 1 as text_1"
        )
    scores, usage = await _compared(engine, request, answer_id, firsts, seconds, observe)
    head = {"id": answer_id, "object": "list", "created": int(time.time()), "model": model}
    data = [{"index": place, "object": "score", "score": value} for place, value in enumerate(scores)]
    await exchange.reply_json(head | {"data": data, "usage": usage})


async def rerank(
    exchange: Exchange, engine: AsyncEngine, request: RerankRequest, model: str, observe: Observer
) -> None:
    """Order documents by how alike they are to the query, the likest first."""
    answer_id = answer_name("rerank", request)
    most = request.top_n or len(request.documents)
    if most < 0:
        raise RequestError(f"top_n is {most:,}; it must be 1 or more, or 0 for all documents")
    documents = completion_prompts(request.documents, "documents")
    scores, usage = await _compared(engine, request, answer_id, [(request.query, None)], documents, observe)
    results = [
        {"index": place, "document": {"text": request.documents[place]}, "relevance_score": scores[place]}
        for place in sorted(range(len(scores)), key=lambda place: -scores[place])
    ]
    await exchange.reply_json({"id": answer_id, "model": model, "usage": usage, "results": results[:most]})


async def _compared(
    engine: AsyncEngine, request: Embedding, answer_id: str, firsts: Prompts, seconds: Prompts, observe: Observer
) -> tuple[list[float], Json]:
    """The cosine of each pair, and what was embedded for them."""
    outputs = await embedded(engine, request, answer_id, [*firsts, *seconds], observe)
    vectors = unit_length(np.stack([vector_of(output, place) for place, output in enumerate(outputs)]))
    before, after = np.split(vectors, [len(firsts)])
    return (before * after).sum(axis=-1, dtype=np.float64).tolist(), usage_of(outputs)
