"""The logits of a sequence's next token that the host changes: penalties, biases, tokens that may not come now."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxpaged.engine.request import Sequence


class RowEdits(NamedTuple):
    """Per token of one row, each token once: see `jaxpaged.model.sampling.Edits`."""

    token_ids: np.ndarray  # int32 [N]
    factor: np.ndarray  # float32 [N]
    add: np.ndarray  # float32 [N]


def row_edits(sequence: Sequence) -> RowEdits | None:
    """What to change before the token after `sequence`'s pending ones is sampled; None for nothing."""
    params = sequence.params
    parts: list[tuple[np.ndarray, np.ndarray | float, np.ndarray | float]] = []  # (token ids, factor, add)
    if params.repetition_penalty != 1.0:
        parts.append((np.unique(sequence.token_ids), params.repetition_penalty, 0.0))
    if (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0) and sequence.num_output_tokens > 0:
        tokens, counts = np.unique(sequence.output_token_ids, return_counts=True)
        parts.append((tokens, 1.0, -params.frequency_penalty * counts - params.presence_penalty))
    if params.logit_bias:
        parts.append((np.asarray(list(params.logit_bias)), 1.0, np.asarray(list(params.logit_bias.values()))))
    if banned := _banned(sequence):
        parts.append((np.asarray(sorted(banned)), 1.0, -np.inf))
    if not parts:
        return None
    tokens, inverse = np.unique(np.concatenate([p[0] for p in parts]), return_inverse=True)
    factor, add = np.ones(len(tokens), np.float32), np.zeros(len(tokens), np.float32)
    begin = 0
    for ids, times, plus in parts:  # within one part every token stands once
        at = inverse[begin : begin + len(ids)]
        factor[at] *= np.float32(times)
        add[at] += np.asarray(plus, np.float32)
        begin += len(ids)
    return RowEdits(tokens.astype(np.int32), factor, add)


def _banned(sequence: Sequence) -> set[int]:
    banned: set[int] = set()
    if sequence.num_output_tokens + sequence.num_pending_tokens <= sequence.params.min_tokens:
        # The token that is sampled now is one of the pending ones already.
        banned |= sequence.eos_token_ids | set(sequence.params.stop_token_ids or ())
    output = sequence.output_token_ids if sequence.bad_words else []
    for word in sequence.bad_words:
        head = list(word[:-1])
        if not head or output[-len(head) :] == head:
            banned.add(word[-1])
    return banned
