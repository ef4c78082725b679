"""Texts to be scored, as requests: the log probabilities of their tokens, none of which is drawn.

All tokens but the last are a request's prompt, whose logprobs it wants; the last is the one token that it may sample.
So a text may be as long as a sequence can grow, and no token is computed that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxpaged.engine.adapters import Adapter
from jaxpaged.engine.intake import Intake
from jaxpaged.engine.prompts import Prompt
from jaxpaged.engine.request import Request
from jaxpaged.errors import RequestError
from jaxpaged.outputs import RequestOutput


class Scores:
    """The requests of one call, and what came of them."""

    def __init__(
        self,
        intake: Intake,
        prompts: Sequence[Prompt],
        completions: Sequence[Prompt] | None,
        prefix: str,
        adapter: Adapter | None = None,
    ) -> None:
        """Raises RequestError where one cannot be served."""
        if completions is not None and len(completions) != len(prompts):
            raise RequestError(f"{len(prompts):,} prompts but {len(completions):,} completions; give one for each")
        self.requests: dict[str, Request] = {}
        self._values: dict[str, np.ndarray] = {}
        self._wanted: dict[str, int] = {}  # how many logprobs, counted from the text's end
        room = intake.max_model_len
        for index, prompt in enumerate(prompts):
            name = f"{prefix}-{index}"
            before = intake.tokens(prompt, room=room)
            completion: Prompt = completions[index] if completions is not None else []
            after = intake.tokens(completion, room=room, add_special_tokens=False) if len(completion) else []
            wanted = len(after) if completions is not None else len(before) - 1
            if len(before) + len(after) > room:
                raise RequestError(
                    f"prompt {index} and its completion have {len(before) + len(after):,} tokens but max_model_len is "
                    f"{room:,}; shorten them or raise max_model_len"
                )
            self._wanted[name] = wanted
            if wanted:
                self.requests[name] = intake.score_request(name, before, after, adapter)
            else:
                self._values[name] = np.zeros(0, np.float32)
        self._names = [f"{prefix}-{index}" for index in range(len(prompts))]

    @property
    def finished(self) -> bool:
        """True once every text has been scored."""
        return len(self._values) == len(self._names)

    def take(self, output: RequestOutput) -> bool:
        """Remember what was found; False for an output of somebody else's."""
        name = output.request_id
        if name not in self.requests:
            return False
        completion = output.outputs[0]
        tokens = [*output.prompt_token_ids[1:], *completion.token_ids]
        entries = [*(output.prompt_logprobs or [])[1:], *(completion.logprobs or [])]
        found = [entry[token].logprob if entry else np.nan for token, entry in zip(tokens, entries, strict=True)]
        if not completion.token_ids:  # the logits were not finite
            found.append(np.nan)
        self._values[name] = np.asarray(found[-self._wanted[name] :], np.float32)
        return True

    def values(self) -> list[np.ndarray]:
        """Logprobs of every text, in order."""
        return [self._values[name] for name in self._names]
