"""One leader, many followers: each call of a compiled function on the leader is made on every follower, in order.

The leader's numpy arguments go out through a collective of JAX, as words in frames of one size. Arrays on the devices
stay where they are: both sides number what their calls give alike, and a message names them by number. Nothing is
pickled, and followers know every shape from the function itself.

The last words of a frame, one for each process, are answers: whether it follows or takes part in what it hears. So
where all are to do something at once, all learn alike whether all do.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpaged.engine.mesh_limits import processes_of
from jaxpaged.errors import ConfigError
from jaxpaged.model.sharding import Placement

FRAME = 1 << 14
"""Words of one collective: 64 KiB, which hold the inputs of most steps."""

END, RELEASE, CALL, SLEEP, WAKE, UPDATE = range(6)
"""What the leader says."""

FOLLOWS, AGREES, REFUSES = range(3)
"""What a process answers."""

_SIZES = 4  # of a function at most: a bucket's
_NO_SIZES = [0] * _SIZES
_HEADER = 3 + _SIZES  # kind, number, sizes, how many arrays are dropped

Words = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Function:
    """A compiled function as the leader calls it: number, sizes, what it is compiled for."""

    relay: Relay
    number: int
    sizes: tuple[int, ...]
    compiled: Callable[..., Any]
    shapes: tuple[Any, ...]

    def __call__(self, *args: Any) -> Any:
        """Call it here, and have the followers call it."""
        return self.relay.call(self, args)


class Relay:
    """One process's end. `made` are the arrays that are still wanted, by number."""

    def __init__(self, fingerprint: str, devices: Sequence[jax.Device], stages: int = 1) -> None:
        """For steps on these devices. ConfigError where the processes were not started with the same `fingerprint`."""
        # XLA's CPU runs in order only what is over the same devices, and what stages call is not: threads of two calls
        # that each wait for all devices could wait for each other.
        self._in_turn = stages > 1 and devices[0].platform == "cpu"
        self.is_leader = jax.process_index() == 0
        self._is_released = False  # what the leader knows of the followers
        self._send = _collective(_carriers(devices))
        self._room = FRAME - jax.process_count()
        self._made: dict[int, Any] = {}  # a follower's
        self._numbers: dict[int, int] = {}  # the leader's: id of a living array -> number
        self._watched: dict[int, Any] = {}  # weak references, which must live to tell of an end
        self._dropped: list[int] = []
        self._next = 0
        print_of = np.asarray(zlib.crc32(fingerprint.encode()), np.uint32)
        if len(np.unique(multihost_utils.process_allgather(print_of))) > 1:
            raise ConfigError(
                f"the {jax.process_count()} processes were given different models or settings; give all the same"
            )
        if self.is_leader:
            atexit.register(self._leave)  # before JAX's own, which waits for the followers to leave

    def adopt(self, tree: Any) -> range:
        """Number arrays that both sides have; their numbers."""
        first = self._next
        for leaf in jax.tree.leaves(tree):
            if self.is_leader:
                self._numbers[id(leaf)] = self._next
                self._watched[self._next] = weakref.ref(leaf, self._forget(id(leaf), self._next))
            else:
                self._made[self._next] = leaf
            self._next += 1
        return range(first, self._next)

    def drop(self, numbers: range) -> None:
        """Forget arrays on both sides that this side still holds, whoever else does."""
        for number in numbers:
            if not self.is_leader:
                del self._made[number]
            elif self._numbers.get(identity := id(self._watched.pop(number)())) == number:
                del self._numbers[identity]

    def call(self, function: Function, args: tuple[Any, ...]) -> Any:
        """The leader's call. Raises ConfigError on a follower, which has nothing to say."""
        if not self.is_leader:
            raise ConfigError(
                f"process {jax.process_index()} of {jax.process_count()} follows process 0, which alone takes "
                "requests; call llm.follow()"
            )
        leaves = jax.tree.leaves(args)
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
            raise RuntimeError("an array was deleted, perhaps donated; nothing has been called in any process")
        numbers = [self._numbers.get(id(leaf), -1) if isinstance(leaf, jax.Array) else -1 for leaf in leaves]
        shapes = jax.tree.leaves(function.shapes)
        data = [_words(x, s.dtype) for x, s, n in zip(leaves, shapes, numbers, strict=True) if n < 0]
        sizes = (*function.sizes, *[0] * (_SIZES - len(function.sizes)))
        self._tell(CALL, [function.number, *sizes], numbers, data)
        with self.guard():
            result = self.done(function.compiled(*args))
        self.adopt(result)
        return result

    def done(self, result: Any) -> Any:
        """What a call gave, waited for where one must end before the next begins."""
        return jax.block_until_ready(result) if self._in_turn else result

    def tell(self, kind: int, number: int = 0) -> None:
        """Have the followers do this, those that `follow` and those that do the same call."""
        answers = self._tell(kind, [number, *_NO_SIZES], [], [])
        self._is_released = FOLLOWS not in answers()

    def agree(self, problem: str | None, follow: Callable[[int, int], Words | None]) -> None:
        """Return in all processes, or raise ConfigError in all: where one has a `problem`, or only follows.

        `follow(until, answer)` is how a follower waits for the leader.
        """
        mine = AGREES if problem is None else REFUSES
        answers = self._tell(UPDATE, [0, *_NO_SIZES], [], [], mine)() if self.is_leader else follow(UPDATE, mine)
        self._is_released = answers is not None and FOLLOWS not in answers
        if answers is None:
            raise ConfigError("process 0 has ended and gives no new weights any more; start all processes anew")
        if problem is not None:
            raise ConfigError(problem)
        reasons = {
            REFUSES: "was given params or a policy that do not fit, as its own error says; give all processes the same",
            FOLLOWS: "only follows; call llm.release(), so that follow() returns there, then this in all processes",
        }
        for answer, reason in reasons.items():
            if (found := np.flatnonzero(answers == answer)).size:
                raise ConfigError(f"process {found[0]} of {len(answers)} {reason}")

    def release(self) -> None:
        """Let the followers return from `follow`, which they call again before the leader calls anything."""
        if not self._is_released:
            self._tell(RELEASE, [0, *_NO_SIZES], [], [])
            self._is_released = True

    def end(self) -> None:
        """Let the followers return from `follow` for good; the leader calls nothing afterwards."""
        if self.is_leader:
            atexit.unregister(self._leave)
            self._tell(END, [0, *_NO_SIZES], [], [])

    def follow(
        self,
        function: Callable[[int, tuple[int, ...]], Function],
        on: Mapping[int, Callable[[int], object]],
        until: int,
        answer: int = FOLLOWS,
    ) -> Words | None:
        """Do as the leader does until it says `until`; then what all answered, or None where it ended.

        `function(number, sizes)` compiles; `on` says what is to be done where the leader says something else.
        """
        while True:
            message, answers = self._hear(answer)
            kind, number, *sizes, num_dropped = message[:_HEADER].tolist()
            dropped, rest = message[_HEADER : _HEADER + num_dropped], message[_HEADER + num_dropped :]
            for each in dropped.tolist():
                del self._made[each]
            if kind == CALL:
                self._call_too(function(number, tuple(sizes)), rest)
            elif kind in on:
                on[kind](number)
            if kind in (until, END):
                return answers if kind == until else None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """What fails on a device here has failed for all: this process ends, and with it the others."""
        try:
            yield
        except ConfigError:
            raise
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter from what was called without waiting
            _die(error)

    def _call_too(self, function: Function, words: Words) -> None:
        """What the leader calls, with the arrays that it names and the numbers that it sent."""
        shapes, structure = jax.tree.flatten(function.shapes)
        leaves, at = [], len(shapes)
        for shape, known in zip(shapes, words[: len(shapes)].tolist(), strict=True):
            if known >= 0:
                leaves.append(self._made[known])
                continue
            num_bytes = int(np.prod(shape.shape)) * shape.dtype.itemsize
            raw = words[at : (at := at - (-num_bytes // 4))].view(np.uint8)[:num_bytes]
            leaves.append(raw.view(shape.dtype).reshape(shape.shape))
        with self.guard():
            self.adopt(self.done(function.compiled(*jax.tree.unflatten(structure, leaves))))

    def _leave(self) -> None:
        """At exit: followers that were released go on by themselves."""
        if not self._is_released:
            self.end()

    def _forget(self, identity: int, number: int) -> Callable[[object], None]:
        def gone(_: object) -> None:
            if self._numbers.get(identity) == number:  # an array may have two: one that is twice among the weights
                del self._numbers[identity]
            del self._watched[number]
            self._dropped.append(number)

        return gone

    def _tell(
        self, kind: int, header: Sequence[int], numbers: Sequence[int], data: Sequence[Words], answer: int = AGREES
    ) -> Callable[[], Words]:
        """Send a message; what all answered, for who wants to wait for it."""
        dropped, self._dropped = self._dropped, []
        words = np.asarray([0, kind, *header, len(dropped), *dropped, *numbers], np.int32)
        message = np.concatenate([words, *data])
        message[0] = len(message)
        self._is_released = self._is_released and kind != CALL
        with self.guard():
            pieces = [message[begin : begin + self._room] for begin in range(0, len(message), self._room)]
            sums = [self.done(self._send(self._frame(piece, answer))) for piece in pieces]

        def answers() -> Words:
            with self.guard():
                return np.asarray(sums[0])[self._room :]

        return answers

    def _hear(self, answer: int) -> tuple[Words, Words]:
        """A message, and what all answered to it."""
        nothing = np.empty(0, np.int32)
        with self.guard():
            frames = [np.asarray(self._send(self._frame(nothing, answer)))]
            length = int(frames[0][0])
            for _ in range(self._room, length, self._room):
                frames.append(np.asarray(self._send(self._frame(nothing, answer))))
        return np.concatenate([frame[: self._room] for frame in frames])[1:length], frames[0][self._room :]

    def _frame(self, piece: Words, answer: int) -> Words:
        frame = np.zeros(FRAME, np.int32)
        frame[: len(piece)] = piece
        frame[self._room + jax.process_index()] = answer
        return frame


def make_relay(placement: Placement | None, fingerprint: str) -> Relay | None:
    """The relay of a mesh over several processes, None for one within this process."""
    if placement is None or len(processes_of(placement)) == 1:
        return None
    return Relay(fingerprint, list(placement.mesh.devices.flat), placement.num_shards("layers"))


def least(number: int, placement: Placement | None) -> int:
    """The least of what the mesh's processes say."""
    if len(processes_of(placement)) == 1:
        return number
    return int(multihost_utils.process_allgather(np.asarray(number, np.int32)).min())


def _collective(devices: Sequence[jax.Device]) -> Callable[[Words], jax.Array]:
    """send(frame) -> the sum of all processes' frames, of which all but the leader's are zeros but for the answers."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    rows = Mesh(np.asarray(devices), ("device",))
    own, everywhere = (NamedSharding(rows, PartitionSpec(*axes)) for axes in (("device",), ()))
    shape = jax.ShapeDtypeStruct((len(devices), FRAME), np.int32, sharding=own)
    summed: Any = jax.jit(lambda frames: frames.sum(0), out_shardings=everywhere).lower(shape).compile()
    nothing = [jax.device_put(np.zeros((1, FRAME), np.int32), device) for device in here[1:]]

    def send(frame: Words) -> jax.Array:
        frames = [jax.device_put(frame[None], here[0]), *nothing]
        total: jax.Array = summed(jax.make_array_from_single_device_arrays(shape.shape, own, frames))
        return total.addressable_data(0)

    return send


def _carriers(devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """What carries messages: a CPU device of each process, so that none waits behind a step.

    Where steps run on CPUs, all of theirs: XLA runs in order only what is over the same devices, and two sums at once
    would mix their words.
    """
    if devices[0].platform == "cpu":
        return devices
    try:
        cpus = {device.process_index: device for device in jax.devices("cpu")}
    except RuntimeError:  # JAX was told to leave the CPU out
        return devices
    return list(cpus.values()) if len(cpus) == jax.process_count() else devices


def _words(x: Any, dtype: np.dtype[Any]) -> Words:
    raw = np.ascontiguousarray(np.asarray(x), dtype).reshape(-1).view(np.uint8)
    return np.pad(raw, (0, -len(raw) % 4)).view(np.int32)


def _die(error: Exception) -> NoReturn:
    """At once: leaving in order would wait for processes that are gone."""
    reason = " ".join(str(error).split())[:300]
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} ends: another one has gone or a step has "
        f"failed ({reason}); start all of them again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
