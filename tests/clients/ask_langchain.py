"""Run by test_clients with langchain-openai: what its classes get, as JSON."""

import asyncio
import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

url = sys.argv[1] + "/v1"
common = {"base_url": url, "api_key": "none", "model": "tiny", "max_retries": 0}
FRUIT = {
    "title": "fruit",
    "type": "object",
    "properties": {"name": {"enum": ["banana", "12"]}},
    "required": ["name"],
    "additionalProperties": False,
}
messages = [SystemMessage("12"), HumanMessage("ban")]
chat = ChatOpenAI(**common, temperature=0, max_completion_tokens=6, stream_usage=True)
long = ChatOpenAI(**common, temperature=0, max_completion_tokens=99)
answer = chat.invoke(messages)
chunks = list(chat.stream(messages))
responses = ChatOpenAI(**common, temperature=0, max_completion_tokens=6, use_responses_api=True)
embeddings = OpenAIEmbeddings(**common, check_embedding_ctx_length=False)  # True takes the tokens of OpenAI's models


calling = long.bind_tools([{"type": "function", "function": {"name": "eat", "parameters": FRUIT}}], tool_choice="eat")
pieces = list(calling.stream("ban"))
streamed = sum(pieces[1:], pieces[0])


async def together():
    return [message.content for message in await chat.abatch([messages] * 6)]


print(
    json.dumps(
        {
            "chat": answer.content,
            "usage": answer.usage_metadata,
            "streamed": "".join(chunk.content for chunk in chunks),
            "stream_usage": next(chunk.usage_metadata for chunk in reversed(chunks) if chunk.usage_metadata),
            "together": asyncio.run(together()),
            "responses": responses.invoke(messages).text,
            "responses_streamed": "".join(chunk.text for chunk in responses.stream(messages)),
            "formed": long.with_structured_output(FRUIT, method="json_schema").invoke("ban"),
            "called": calling.invoke("ban").tool_calls,
            "called_streamed": streamed.tool_calls,
            "num_pieces": len([piece for piece in pieces if piece.tool_call_chunks]),
            "completion": OpenAI(**common, temperature=0, max_tokens=6).invoke("banana"),
            "embeddings": embeddings.embed_documents(["ban", "banana 12"]),
            "query": embeddings.embed_query("ban"),
        }
    )
)
