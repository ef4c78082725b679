"""Complete prompts, answer a message, look at the probabilities: `python examples/quickstart.py [MODEL]`."""

from __future__ import annotations

from any_model import open_llm

from jaxpaged import SamplingParams


def main() -> None:
    """The four things most programs do."""
    llm = open_llm(max_model_len=512, max_num_seqs=4)

    # Prompts are text or token ids; outputs come in their order.
    greedy = SamplingParams(temperature=0.0, max_tokens=16)
    for output in llm.generate(["The capital of France is", "2, 4, 6,"], greedy, use_tqdm=False):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")

    # A chat goes through the model's own template.
    (answer,) = llm.chat([{"role": "user", "content": "Name three colours."}], greedy, use_tqdm=False)
    print("chat:", answer.outputs[0].text)

    # Several completions of one prompt. A seed makes them the same in every batch.
    drawn = SamplingParams(n=2, temperature=0.8, top_p=0.95, seed=7, max_tokens=12, stop="\n")
    (output,) = llm.generate("My favourite food is", drawn, use_tqdm=False)
    for completion in output.outputs:
        print(f"drawn {completion.index}: {completion.text!r}")

    # Log probabilities of what was generated, and of any text.
    (output,) = llm.generate("Roses are", SamplingParams(temperature=0.0, max_tokens=1, logprobs=3), use_tqdm=False)
    for likely in (output.outputs[0].logprobs or [])[0].values():
        print(f"  {likely.rank}. {likely.decoded_token!r} {likely.logprob:.2f}")
    (scores,) = llm.score(["Roses are red."])
    print(f"mean log probability of 'Roses are red.': {scores.mean():.2f}")


if __name__ == "__main__":
    main()
