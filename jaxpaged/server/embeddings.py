"""/v1/embeddings: texts in, vectors out, as numbers or as the bytes that OpenAI's own client asks for."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence

import numpy as np

from jaxpaged.engine.embedding import unit_length
from jaxpaged.engine.intake import EMBEDDING
from jaxpaged.errors import RequestError
from jaxpaged.outputs import RequestOutput
from jaxpaged.server.answers import Json
from jaxpaged.server.async_engine import AsyncEngine, NewRequest
from jaxpaged.server.exchange import Exchange
from jaxpaged.server.faults import Fault
from jaxpaged.server.generation import Observer, Run, completion_prompts
from jaxpaged.server.protocol import Embedding, EmbeddingRequest
from jaxpaged.server.truncation import Prompts, cut


async def answer(
    exchange: Exchange, engine: AsyncEngine, request: EmbeddingRequest, model: str, observe: Observer
) -> None:
    """Embed every input and write the answer, in the inputs' order."""
    if request.dimensions is not None and request.dimensions != engine.dim:
        raise RequestError(
            f"dimensions is {request.dimensions:,} but this model's embeddings have {engine.dim:,} and are not made "
            "to be cut; leave it out"
        )
    answer_id = answer_name("embd", request)
    outputs = await embedded(engine, request, answer_id, completion_prompts(request.input, "input"), observe)
    data = [_entry(place, output, request) for place, output in enumerate(outputs)]
    usage = usage_of(outputs)
    await exchange.reply_json({"id": answer_id, "object": "list", "model": model, "data": data, "usage": usage})


def answer_name(prefix: str, request: Embedding) -> str:
    """What the answer is called. Raises RequestError."""
    if request.request_id is not None and not 0 < len(request.request_id) <= 256:
        raise RequestError(f"request_id has {len(request.request_id):,} characters; it must have 1 to 256")
    return f"{prefix}-{request.request_id or uuid.uuid4().hex}"


async def embedded(
    engine: AsyncEngine, request: Embedding, answer_id: str, given: Prompts, observe: Observer
) -> list[RequestOutput]:
    """What the engine says of each text, in their order."""
    inputs = await cut(engine, given, request.truncate_prompt_tokens, engine.max_model_len)
    requests = [
        NewRequest(
            f"{answer_id}-{place}",
            prompt,
            EMBEDDING,
            "final",
            priority=request.priority or 0,
            cache_salt=request.cache_salt,
            pooling=request.pooling or "mean",
            lora_request=engine.lora_named(request.model or ""),
        )
        for place, (prompt, _) in enumerate(inputs)
    ]
    async with Run(engine, requests, observe) as run:
        outputs = {place: output async for place, output in run.outputs()}
    return [outputs[place] for place in range(len(requests))]


def vector_of(output: RequestOutput, place: int) -> np.ndarray:
    """An embedding. Raises Fault where the model gives none."""
    if output.embedding is None:
        raise Fault(500, f"the model's logits for input {place} are not finite; its weights may be broken")
    return output.embedding


def usage_of(outputs: Sequence[RequestOutput]) -> Json:
    """Tokens of all texts, each embedded once."""
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _entry(place: int, output: RequestOutput, request: EmbeddingRequest) -> Json:
    vector = vector_of(output, place)
    if request.normalize is not False:
        vector = unit_length(vector)
    if request.encoding_format == "base64":
        coded: object = base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
    else:
        coded = vector.tolist()
    return {"object": "embedding", "index": place, "embedding": coded}
