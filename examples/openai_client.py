"""OpenAI's client against `jaxpaged serve`: a streamed chat, then two completions with their likeliest tokens.

    jaxpaged serve path/to/model &
    python examples/openai_client.py [http://127.0.0.1:8000/v1]

Needs `pip install openai`.
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(url: str = "http://127.0.0.1:8000/v1") -> None:
    """Ask the first model that is served."""
    with OpenAI(base_url=url, api_key="none") as client:
        model = client.models.list().data[0].id

        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_completion_tokens=48,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            elif chunk.usage:
                print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]")

        answer = client.completions.create(
            model=model,
            prompt=["The capital of France is", "Once upon a"],
            max_tokens=1,
            temperature=0,
            logprobs=3,
            extra_body={"min_p": 0.0},  # what OpenAI has no argument for
        )
        for choice in answer.choices:
            top = choice.logprobs.top_logprobs[0] if choice.logprobs and choice.logprobs.top_logprobs else {}
            print(f"{choice.text!r}:", ", ".join(f"{token!r} {logprob:.2f}" for token, logprob in top.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
