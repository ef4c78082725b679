"""`jaxpaged chat`: talk with a model in the terminal, its answers written as they come.

Ctrl-C stops the answer; a second one, or one at the prompt, leaves.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from jaxpaged.cli.options import (
    add_engine_arguments,
    add_lora_path,
    add_sampling_arguments,
    chat_template,
    engine_options,
    lora_options,
    lora_request,
    sampling_params,
)
from jaxpaged.errors import RequestError

if TYPE_CHECKING:
    from jaxpaged.llm import LLM
    from jaxpaged.lora_request import LoRARequest
    from jaxpaged.sampling_params import SamplingParams

HELP = "/reset forgets the conversation, /system TEXT sets the instructions, /exit leaves; Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_engine_arguments(parser)
    add_lora_path(parser)
    parser.add_argument("--system", help="instructions that stand before the conversation")
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template (default: the checkpoint's)")
    parser.add_argument("--stats", action="store_true", help="show tokens and tokens/s after each answer")
    add_sampling_arguments(parser, leave_out=("n", "best_of", "logprobs", "prompt_logprobs"))


def run(args: argparse.Namespace) -> int:
    """Read a line, answer it, until the end of the input. Raises JaxpagedError where the model cannot be loaded."""
    params, template = sampling_params(args, max_tokens=None), chat_template(args.chat_template)
    adapter = lora_request(args)

    from jaxpaged import LLM  # only here: `--help` needs no jax

    llm = LLM(args.model, **({"max_num_seqs": 1} | lora_options(args) | engine_options(args)))
    if llm.tokenizer is not None and template is not None:
        llm.tokenizer.chat_template = template
    if llm.tokenizer is None or llm.tokenizer.chat_template is None:
        raise RequestError(f"{args.model} has no chat template; use `jaxpaged generate`, or give --chat-template")
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  # gives `input` line editing and a history
    print(HELP)
    chat = Chat(llm, params, args.system, show_stats=args.stats, adapter=adapter)
    try:
        while chat.take(input("\n> ")):
            pass
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


class Chat:
    """One conversation: its messages, and what answers them."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None = None,
        *,
        show_stats: bool = False,
        adapter: LoRARequest | None = None,
    ):
        self.llm, self.params, self.show_stats, self.adapter = llm, params, show_stats, adapter
        self.messages: list[dict[str, Any]] = []
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Forget everything but the instructions."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def take(self, line: str) -> bool:
        """Do what one line asks: a command or a message. False where it asks to leave."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "/exit" | "/quit":
                return False
            case "/reset":
                self.reset(self.system)
            case "/system":
                self.reset(rest.strip() or None)
            case _ if command.startswith("/"):
                print(HELP)
            case _:
                self.answer(line)
        return True

    def answer(self, text: str) -> None:
        """Stream the answer and keep it; a message that cannot be served is said to be so, and dropped.

        Raises KeyboardInterrupt where the answer was interrupted twice.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._stream(self.llm.encode_chat(self.messages))
        except RequestError as error:
            self.messages.pop()
            print(f"error: {error} (/reset starts anew)", file=sys.stderr)
            return
        self.messages.append({"role": "assistant", "content": answer})

    def _stream(self, prompt: list[int]) -> str:
        pieces, num_tokens, num_cached = [], 0, 0
        start = time.perf_counter()
        first: float | None = None
        with _interrupts() as interrupted:
            for delta in self.llm.stream(prompt, self.params, lora_request=self.adapter):
                first = first or time.perf_counter()
                pieces.append(delta.outputs[0].text)
                num_tokens += len(delta.outputs[0].token_ids)
                num_cached = delta.num_cached_tokens
                print(pieces[-1], end="", flush=True)
                if interrupted:
                    print(" [stopped]", end="")
                    break
        print()
        if self.show_stats and first is not None:
            print(_stats(len(prompt), num_cached, num_tokens, first - start, time.perf_counter() - first))
        return "".join(pieces)


def _stats(num_prompt: int, num_cached: int, num_tokens: int, wait: float, seconds: float) -> str:
    speed = f"{(num_tokens - 1) / seconds:.1f} tokens/s" if num_tokens > 1 and seconds > 0 else "1 token"
    prompt = f"prompt {num_prompt:,} tokens, {num_cached:,} of them cached"
    return f"[{prompt}; first token after {wait:.2f} s; {num_tokens:,} tokens, {speed}]"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that is non-empty after the first Ctrl-C; the second raises KeyboardInterrupt.

    The engine is thus never interrupted in the middle of a step.
    """
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
