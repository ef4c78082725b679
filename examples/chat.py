"""A chat that streams, in twenty lines: `python examples/chat.py [MODEL]`. `jaxpaged chat` does more."""

from __future__ import annotations

from any_model import open_llm

from jaxpaged import SamplingParams


def main() -> None:
    """Read a line, stream the answer, remember both, until the end of the input."""
    llm = open_llm(max_num_seqs=1, max_model_len=512)
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=64)
    messages: list[dict[str, str]] = []
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:
            return
        answer = ""
        # What both turns have in common is found in the prefix cache and not computed again.
        for delta in llm.stream(llm.encode_chat(messages), params):
            print(delta.outputs[0].text, end="", flush=True)
            answer += delta.outputs[0].text
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
