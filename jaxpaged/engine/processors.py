"""Callers' own functions on the logits: compiled once each, called on the rows whose sequences want them.

A function gets `ROWS` rows at a time, whatever the bucket, so that one compilation serves all steps. A sequence's state
is an array (or a pytree of some) on the device and belongs to the sequence: `processor_states[n]` is the one before its
token n. Those of tokens that the host has not read are kept beside each other, so that a fork from any known token, and
a sequence computed anew, find theirs.

On a mesh a function is given whole rows: those it changes are gathered, and no others. All devices compute it, and have
the states.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpaged.engine.compilation import Compiler, traced
from jaxpaged.engine.request import Sequence as TokenSequence
from jaxpaged.engine.scheduler import Chunk
from jaxpaged.errors import RequestError
from jaxpaged.logits_processor import LogitsProcessor
from jaxpaged.model.sharding import Placement

ROWS = 8


class Processed(NamedTuple):
    """Sequences of one function whose logits it has seen, and their states since."""

    processor: LogitsProcessor
    rows: list[tuple[int, int]]  # data shard, and row of it
    sequences: list[TokenSequence]
    places: list[int]  # of the token that is chosen, in its sequence
    states: tuple[Any, ...]  # `ROWS` of them


class Processors:
    """Checks, compiles and calls functions on logits."""

    def __init__(self, compiler: Compiler, vocab_size: int, placement: Placement | None = None) -> None:
        """`placement` is where the logits lie."""
        self._compiler = compiler
        self._num_shards = 1 if placement is None else placement.num_shards("data")
        self._whole = None if placement is None else placement.sharding()
        self._cut = None if placement is None else placement.sharding("data", "vocab")
        self._logits = jax.ShapeDtypeStruct((vocab_size,), np.float32)
        self._checked: set[Hashable] = set()

    def check(self, processor: LogitsProcessor, prompt_token_ids: Sequence[int]) -> None:
        """Raise RequestError unless the functions can be traced and give back what they take."""
        if processor in self._checked:
            return
        try:
            state = jax.tree.map(_shape, _first_state(processor, prompt_token_ids))
            logits, after = jax.eval_shape(processor.apply, self._logits, state)
            observed = after
            if processor.observe is not None:
                observed = jax.eval_shape(processor.observe, state, jax.ShapeDtypeStruct((), np.int32))
        except Exception as error:
            raise RequestError(f"the logits processor cannot be traced: {type(error).__name__}: {error}") from error
        for name, got, wanted in (
            ("logits from apply", logits, self._logits),
            ("a state from apply", after, state),
            ("a state from observe", observed, state),
        ):
            if jax.tree.map(_shape, got) != wanted:
                raise RequestError(f"the logits processor gives {name} of {_named(got)}; it must be {_named(wanted)}")
        self._checked.add(processor)

    def apply(self, logits: Array, rows: Iterable[tuple[int, Chunk]]) -> tuple[Array, list[Processed]]:
        """The logits [R, V] with the rows changed whose sequences want it, and what `observe` is to be given."""
        num_rows = logits.shape[0]
        each = num_rows // self._num_shards
        processed = []
        for processor, members in _by_processor(rows):
            index = np.full(ROWS, num_rows, np.int32)  # rows past the end: dropped
            index[: len(members)] = [row for row, _ in members]
            sequences = [chunk.sequence for _, chunk in members]
            places = [chunk.start + chunk.length for _, chunk in members]
            states = tuple(self._state(processor, s, place) for s, place in zip(sequences, places, strict=True))
            states += (states[0],) * (ROWS - len(states))
            block = self._call("take", num_rows, _take, logits, index)
            own = (processor, _key(states[0]))
            block, states = self._call("process", own, _several(processor.apply), block, states)
            logits = self._call("put", num_rows, _put, logits, index, block, out=self._cut)
            shard_rows = [divmod(row, each) for row, _ in members]
            processed.append(Processed(processor, shard_rows, sequences, places, states))
        return logits, processed

    def observe(self, processed: Iterable[Processed], tokens: Array) -> None:
        """Give the states the tokens that were chosen, each data shard's end to end, and the sequences their states."""
        each = tokens.shape[0] // self._num_shards
        for processor, rows, sequences, places, states in processed:
            if processor.observe is not None:
                index = np.zeros(ROWS, np.int32)
                index[: len(rows)] = [shard * each + row for shard, row in rows]
                own = (processor, _key(states[0]))
                states = self._call("observe", own, _observing(processor.observe), states, tokens, index)
            for sequence, place, state in zip(sequences, places, states, strict=False):
                known = len(sequence.token_ids)
                kept = {n: s for n, s in sequence.processor_states.items() if n >= known}
                sequence.processor_states = kept | {place + 1: state}

    def _call(self, name: str, key: Hashable, function: Callable[..., Any], *arguments: Any, out: Any = None) -> Any:
        """`function` of the arguments, compiled for this key once; on a mesh what it gives lies whole, or as `out`."""
        options = {} if self._whole is None else {"out_shardings": out or self._whole}
        return self._compiler.get((name, (key,)), traced, (function, options), arguments)(*arguments)

    def _state(self, processor: LogitsProcessor, sequence: TokenSequence, place: int) -> Any:
        if place == sequence.prompt_len:
            return jax.device_put(_first_state(processor, sequence.token_ids[:place]), self._whole)
        return sequence.processor_states[place]


def _by_processor(rows: Iterable[tuple[int, Chunk]]) -> Iterator[tuple[LogitsProcessor, list[tuple[int, Chunk]]]]:
    """Rows that sample, by the function that they want, at most `ROWS` together."""
    wanted: dict[LogitsProcessor, list[tuple[int, Chunk]]] = {}
    for row, chunk in rows:
        processor = chunk.sequence.params.processor
        if chunk.samples and processor is not None:
            wanted.setdefault(processor, []).append((row, chunk))
    for processor, members in wanted.items():
        for begin in range(0, len(members), ROWS):
            yield processor, members[begin : begin + ROWS]


def _first_state(processor: LogitsProcessor, prompt_token_ids: Sequence[int]) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), processor.init(prompt_token_ids))


def _take(logits: Array, rows: Array) -> Array:
    return logits.at[rows].get(mode="clip")


def _put(logits: Array, rows: Array, block: Array) -> Array:
    return logits.at[rows].set(block, mode="drop")


def _several(apply: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[..., Any]:
    def rows(block: Array, states: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
        block, stacked = jax.vmap(apply)(block, _stack(states))
        return block, _unstack(stacked, len(states))

    return rows


def _observing(observe: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def rows(states: tuple[Any, ...], tokens: Array, index: Array) -> tuple[Any, ...]:
        return _unstack(jax.vmap(observe)(_stack(states), tokens[index]), len(states))

    return rows


def _stack(states: tuple[Any, ...]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _unstack(stacked: Any, count: int) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(stacked)
    return tuple(jax.tree.unflatten(structure, [leaf[index] for leaf in leaves]) for index in range(count))


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _key(state: Any) -> Hashable:
    """Sequences of one function may have states of several shapes; each is compiled for."""
    structure: Hashable = jax.tree.structure(state)
    return structure, tuple((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(state))


def _named(tree: Any) -> str:
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree))
