"""The engine: requests in, a step at a time, outputs out. Owns the step under way; all else has owners of its own.

`step` is schedule, dispatch, read, update. A step is dispatched before the one before it is read, so the host works on
step n while the device computes step n + 1; outputs therefore come one step late. Where tokens are guessed ahead, which
takes those before, a step is read before the next is planned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import count
from typing import Literal, get_args

import numpy as np

from jaxpaged.config import EngineConfig
from jaxpaged.engine.adapters import Adapters, ReadAdapter
from jaxpaged.engine.beam_search import BeamSearch
from jaxpaged.engine.compilation import Build, traced
from jaxpaged.engine.detokenizer import Detokenizer
from jaxpaged.engine.grammar import Grammar
from jaxpaged.engine.groups import Groups
from jaxpaged.engine.host_tier import HostTier
from jaxpaged.engine.intake import EMBEDDING, Intake
from jaxpaged.engine.ledger import Ledger
from jaxpaged.engine.page_map import PageInfo
from jaxpaged.engine.prompts import Prompt
from jaxpaged.engine.report import OutputKind, Tracked
from jaxpaged.engine.request import seed_words
from jaxpaged.engine.runner import InFlight, Runner
from jaxpaged.engine.scheduler import Plan
from jaxpaged.engine.scoring import Scores
from jaxpaged.engine.shards import make_shards
from jaxpaged.engine.stats import EngineStats
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import AsleepError, ConfigError, QueueFullError, RequestError
from jaxpaged.lora_request import LoRARequest
from jaxpaged.model import lora
from jaxpaged.model.params import Params, quantize_params, quantized_as
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Decoder
from jaxpaged.outputs import Pooling, RequestOutput
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

log = logging.getLogger("jaxpaged")

UpdatePolicy = Literal["keep", "recompute", "abort"]
"""What happens to requests under way when the weights change."""


class Engine:
    """Runs any number of requests together. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        spec: Decoder,
        params: Params,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Seq[int] = (),
        show_progress: bool = False,
        placement: Placement | None = None,
        build: Build = traced,
        read_adapter: ReadAdapter | None = None,
    ) -> None:
        """Make the pool; with `config.warmup`, compile. Raises ConfigError where model, memory or config do not fit.

        With a `placement` weights and pool are cut over its mesh. `build` says where compiled functions come from: see
        `engine.exports`. `read_adapter` reads the folders of adapters, whose names are the checkpoint's.
        """
        self.config = config or EngineConfig()
        if (wanted := quantized_as(spec, self.config.quantization)) != spec:
            spec, params = wanted, quantize_params(params, wanted)
        self.spec = spec
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids) | (tokenizer.eos_token_ids if tokenizer else frozenset())
        self.runner = Runner(spec, params, self.config, placement, build)
        self.max_model_len = self.runner.max_model_len
        self._host = HostTier(self.runner.num_host_pages, self.runner.min_host_pages)
        self.adapters = Adapters(
            self.config.max_loras if self.config.enable_lora else 0,
            self.config.max_lora_rank,
            {path: (leaf.shape[0], leaf.shape[1]) for path, leaf in lora.adaptable(spec).items()},
            params["embed"]["w"].dtype,
            read_adapter,
        )
        host = self._host if self._host.num_slots else None
        self.shards = make_shards(spec, self.config, self.runner, host, self.adapters)
        self._ledger = Ledger(self.shards, tokenizer, self.runner.scrub)
        self._intake = Intake(spec, self.config, tokenizer, self.eos_token_ids, self.max_model_len)
        self._groups = [Groups(self.runner.num_stages, self.config.page_size) for _ in self.shards]
        self._in_flight: list[InFlight | None] = [None] * self.runner.num_stages
        self._scored = count()
        self._num_steps = 0
        self._slots_held = self._slots_wasted = 0
        if self.config.warmup:
            self.runner.warm_up(show_progress=show_progress)

    @property
    def params(self) -> Params:
        """The weights that the next step will use; only their shapes once `sleep(2)` has let go of them."""
        return self.runner.params

    def encode(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's token ids as `add_request` would take them, or its RequestError. Any thread may call this."""
        return self._intake.encode(prompt, params)

    def grammar(self, params: SamplingParams) -> Grammar | None:
        """`structured_outputs` compiled, for `add_request`, or its RequestError. Any thread may call this."""
        return self._intake.grammar(params)

    @property
    def is_sleeping(self) -> bool:
        """True from `sleep` to `wake_up`."""
        return self.runner.is_sleeping

    @property
    def has_unfinished(self) -> bool:
        """True while `step` has something to do or to say."""
        return bool(self._ledger.requests or self._ledger.undelivered or any(self._in_flight))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        output_kind: OutputKind = "cumulative",
        prompt_text: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        pooling: Pooling | None = None,
        grammar: Grammar | None = None,
        lora_request: LoRARequest | str | None = None,
    ) -> None:
        """Queue a request. Raises, with nothing queued, RequestError where it can never be served and QueueFullError
        where `max_num_queued_requests` wait already.

        `prompt_text` is reported as the prompt of one given as token ids. With `scheduling_policy="priority"` the
        lowest `priority` comes first. Prefixes are shared only among requests with the same `cache_salt`. With a
        `pooling`, which takes no `params`, the request gets an embedding of the prompt, and no token. `grammar` is
        what `grammar(params)` gave; without it, structured outputs are compiled here. `lora_request` is the adapter
        wanted, or the name of one that is known.
        """
        params = params or (SamplingParams() if pooling is None else EMBEDDING)
        if not isinstance(params, SamplingParams):
            raise RequestError(f"the sampling parameters are {params!r:.80}; give a SamplingParams")
        self._check_room(request_id)
        request = self._intake.request(
            request_id,
            prompt,
            params,
            prompt_text=prompt_text,
            priority=priority,
            cache_salt=cache_salt,
            pooling=pooling,
            grammar=grammar,
            adapter=self.adapters.find(lora_request),
        )
        if params.processor is not None:
            if (count := self.runner.num_processes) > 1:
                raise RequestError(f"logits_processor does not work over {count} processes yet; leave it out")
            self.runner.processors.check(params.processor, request.prompt_token_ids)
        detokenizers = [Detokenizer(self.tokenizer, params, request.prompt_token_ids) for _ in request.sequences]
        self._ledger.add(Tracked(request, output_kind, detokenizers, [0] * params.num_completions))

    def add_beam_search(
        self,
        request_id: str,
        prompt: Prompt,
        params: BeamSearchParams,
        *,
        prompt_text: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        lora_request: LoRARequest | str | None = None,
    ) -> None:
        """Queue a beam search, as `add_request` does; its one output has the hypotheses as completions, best first."""
        self._check_room(request_id)
        request = self._intake.beam_request(
            request_id,
            prompt,
            params,
            prompt_text=prompt_text,
            priority=priority,
            cache_salt=cache_salt,
            adapter=self.adapters.find(lora_request),
        )
        self._ledger.add(Tracked(request, "final", [], [], BeamSearch(request, params)))

    def fork(self, request_id: str, n: int = 1, *, index: int = 0) -> list[int]:
        """`n` more completions of a request that go on from the tokens of completion `index` so far, each with a seed
        of its own; their indices. Its pages are shared until they are written to.
        """
        tracked = self._ledger.requests.get(request_id)
        if tracked is None or tracked.beams is not None:
            raise RequestError(f"no request {request_id!r} that can be forked is under way")
        sequences = tracked.request.sequences
        if not 0 <= index < len(sequences) or sequences[index].finished:
            raise RequestError(f"completion {index} of request {request_id!r} has finished or never was")
        parent = sequences[index]
        made = range(len(sequences), len(sequences) + n)
        for child_index in made:
            child = parent.fork(child_index, seed_words(tracked.request.seed, child_index))
            detokenizer = Detokenizer(self.tokenizer, child.params, tracked.request.prompt_token_ids)
            detokenizer.append(child.output_token_ids)
            sequences.append(child)
            tracked.detokenizers.append(detokenizer)
            tracked.num_reported.append(0)
            tracked.shard.scheduler.fork(parent, child)
        return list(made)

    def abort(self, request_id: str) -> bool:
        """End a request now, in whatever state; its last output comes with the next step. False for an unknown id."""
        return self._ledger.abort(request_id)

    def take_aborted(self) -> list[RequestOutput]:
        """The last outputs of requests aborted since the last step, for who takes no step now, and what `sleep`
        read.
        """
        outputs, self._ledger.undelivered = self._ledger.undelivered, []
        return outputs

    def step(self) -> list[RequestOutput]:
        """Schedule and dispatch a step, then read the one before it: the outputs of requests that moved on."""
        if self.is_sleeping:
            raise AsleepError("the engine sleeps and has no page pool; call wake_up() before step()")
        if self.shards.await_tokens:
            self._ledger.undelivered += self._read(self._in_flight)
            self._in_flight = [None] * self.runner.num_stages
        plans = self.shards.schedule()
        before = self._in_flight
        self._in_flight = self._dispatch(plans, before)
        self._num_steps += any(self._in_flight)
        held, wasted = self.shards.slots()
        self._slots_held += held
        self._slots_wasted += wasted
        if leaked := self.shards.num_leaked:
            log.error("%d pages are held though no sequence runs; please report this", leaked)
        outputs = self.take_aborted()
        return outputs + self._read(before)

    def score(
        self,
        prompts: Seq[Prompt],
        completions: Seq[Prompt] | None = None,
        lora_request: LoRARequest | str | None = None,
    ) -> list[np.ndarray]:
        """log p(token | those before it) of each completion's tokens after its prompt, float32 [tokens]; without
        completions, of all tokens of each prompt but its first.

        Runs until all is scored, other requests with it, whose outputs come with the next `step`. Raises RequestError
        before anything runs where one cannot be served.
        """
        adapter = self.adapters.find(lora_request)
        scores = Scores(self._intake, prompts, completions, f"score-{next(self._scored)}", adapter)
        for request in scores.requests.values():
            detokenizer = Detokenizer(None, request.params, request.prompt_token_ids)
            self._ledger.add(Tracked(request, "final", [detokenizer], [0]))
        others: list[RequestOutput] = []
        try:
            while not scores.finished:
                others += [output for output in self.step() if not scores.take(output)]
        finally:
            for request_id in scores.requests:
                self.abort(request_id)
            left = [o for o in self._ledger.undelivered if o.request_id not in scores.requests]
            self._ledger.undelivered = others + left
        return scores.values()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, those on the host too; running requests are not touched."""
        self.shards.reset_prefix_cache()

    def update_params(self, params: Params, policy: UpdatePolicy = "keep") -> None:
        """Use other weights from the next step on: the given arrays themselves where they lie as the old ones do.

        All of them or none: raises ConfigError that lists every leaf that does not fit. Nothing is compiled. Requests
        under way go on with the keys and values they have (`keep`), have them computed anew (`recompute`) or end
        (`abort`). Prefixes cached so far are forgotten. `CompletionOutput.weight_versions` tells which weights made
        which token: 0 the first, one more with each call.

        Over several processes all of them call this, outside `follow`, each with its part of the same arrays, and it is
        taken or refused in all. So it is with `wake_up(params)`.
        """
        self.runner.update_params(params, _policy_problem(policy))
        self.shards.reset_prefix_cache()
        if policy == "recompute":
            self.shards.preempt_all()
        elif policy == "abort":
            for request_id in list(self._ledger.requests):
                self.abort(request_id)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter's folder, unless that has been done; whether it was read now. Requests that name it then
        wait for no file. Raises CheckpointError or ConfigError where it does not fit.
        """
        return self.adapters.add(lora_request)

    def update_lora(
        self, name: str, adapter: lora.Adapter, *, scale: float = 1.0, policy: UpdatePolicy = "keep"
    ) -> None:
        """Give an adapter these numbers, `scale` times a times b, from the next step on; an unknown name is a new one.

        The arrays are copied, by way of the host, and nothing is compiled. Raises ConfigError, and changes nothing,
        where they do not fit. Requests under way with this adapter do as `policy` says, see `update_params`, and
        `CompletionOutput.weight_versions` counts this as another version of the weights. Prefixes that were cached with
        the old numbers are not used again.
        """
        if problem := _policy_problem(policy):
            raise ConfigError(problem)
        known = name in self.adapters
        changed = self.adapters.update(name, adapter, scale)
        if not known:
            return
        self.runner.param_version += 1
        if policy == "recompute":
            self.shards.preempt_all(changed)
        elif policy == "abort":
            for request_id, tracked in list(self._ledger.requests.items()):
                if tracked.request.sequences[0].adapter is changed:
                    self.abort(request_id)

    def remove_lora(self, name: str) -> None:
        """Forget an adapter; requests under way with it go on. RequestError where there is none of that name."""
        self.adapters.remove(name)

    def list_loras(self) -> list[LoRARequest]:
        """The adapters that requests may name."""
        return self.adapters.requests()

    def sleep(self, level: Literal[1, 2] = 1) -> None:
        """Give back the pool's memory and, at level 2, let go of the weights, until `wake_up`.

        Requests under way stay, and will be computed anew; more may be added, aborted, and given other weights
        meanwhile. The weights' memory is free once nobody else, such as a trainer, holds the same arrays.
        """
        if level not in (1, 2):
            raise ConfigError(f"level is {level!r}; known: 1 (drops the page pool), 2 (the weights too)")
        self._ledger.undelivered += self._read(self._in_flight)
        self._in_flight = [None] * self.runner.num_stages
        self.shards.preempt_all()
        self.shards.reset_prefix_cache()
        self.runner.sleep(drop_params=level == 2)

    def wake_up(self, params: Params | None = None) -> None:
        """Make the pool again, after taking `params` as `update_params` does; nothing is compiled.

        Raises ConfigError, and sleeps on, where there are no weights or those given do not fit.
        """
        if params is not None:
            self.update_params(params)
        if not self.runner.has_params:
            raise ConfigError("sleep(2) let go of the weights; call wake_up(params)")
        self.runner.wake()

    def page_map(self) -> list[PageInfo]:
        """Who holds which page now. Pages are numbered over all data shards, as they lie in the pools' arrays."""
        return self.shards.page_map()

    def stats(self) -> EngineStats:
        """What the engine is doing and has done, all data shards together."""
        total = self.shards.sum
        return EngineStats(
            num_waiting=self.shards.num_waiting,
            num_running=self.shards.num_running,
            pages_total=total(lambda s: s.pool.num_pages - 1),
            pages_free=total(lambda s: s.pool.num_free),
            pages_cached=total(lambda s: s.pool.num_cached),
            pages_held=total(lambda s: s.pool.num_held),
            pages_leaked=self.shards.num_leaked,
            page_size=self.config.page_size,
            page_bytes=self.runner.page_bytes,
            kv_waste=self._slots_wasted / self._slots_held if self._slots_held else 0.0,
            num_preemptions=total(lambda s: s.scheduler.num_preemptions),
            prefix_cache_queries=total(lambda s: s.scheduler.prefix_cache_queries),
            prefix_cache_hits=total(lambda s: s.scheduler.prefix_cache_hits),
            host_pages_total=self._host.num_slots,
            host_pages_held=self._host.num_held,
            host_pages_moved_out=self._host.num_moved_out,
            host_pages_moved_in=self._host.num_moved_in,
            host_cache_hits=total(lambda s: s.scheduler.host_cache_hits),
            num_drafts=total(lambda s: s.scheduler.drafter.num_drafts if s.scheduler.drafter else 0),
            num_drafted_tokens=total(lambda s: s.scheduler.drafter.num_drafted_tokens if s.scheduler.drafter else 0),
            num_accepted_tokens=total(lambda s: s.scheduler.drafter.num_accepted_tokens if s.scheduler.drafter else 0),
            prompt_tokens=self._ledger.prompt_tokens,
            generation_tokens=self._ledger.generation_tokens,
            num_steps=self._num_steps,
            num_compilations=self.runner.num_compilations,
            max_model_len=self.max_model_len,
        )

    def _dispatch(self, plans: Seq[Plan], before: Seq[InFlight | None]) -> list[InFlight | None]:
        """The step under way, a part for each group. One that cannot begin leaves every request as it was, to be
        computed anew.
        """
        parts = [groups.split(plan) for groups, plan in zip(self._groups, plans, strict=True)]
        try:
            for adapter in self.adapters.loads():
                self.runner.put_in_slot(adapter)
            self.adapters.loaded()
            return [
                None if all(plan.is_empty for plan in group) else self.runner.dispatch(group, of_before)
                for *group, of_before in zip(*parts, before, strict=True)
            ]
        except Exception as error:
            for shard, plan in zip(self.shards, plans, strict=True):
                shard.scheduler.withdraw(plan)
            self._in_flight = [None] * self.runner.num_stages
            self._ledger.undelivered += self._read(before)
            if not self.runner.has_lost_params:
                raise
            raise ConfigError(
                "the weights were deleted, or donated to another function, while the engine held them; "
                "call update_params with the new arrays before the next step"
            ) from error

    def _read(self, steps: Seq[InFlight | None]) -> list[RequestOutput]:
        """Wait for a step's parts, and take what they sampled."""
        return [output for step in steps if step is not None for output in self._ledger.take(self.runner.read(step))]

    def _check_room(self, request_id: str) -> None:
        if request_id in self._ledger.requests:
            raise RequestError(f"request id {request_id!r} is in use; give each request its own")
        limit = self.config.max_num_queued_requests
        if limit is not None and (waiting := self.shards.num_waiting) >= limit:
            raise QueueFullError(
                f"{waiting:,} requests wait and max_num_queued_requests is {limit:,}; try again later, or raise it"
            )


def _policy_problem(policy: str) -> str | None:
    known = get_args(UpdatePolicy)
    return None if policy in known else f"policy is {policy!r}; known: {', '.join(known)}"


def request_ids(prefix: str = "request") -> Iterator[str]:
    """Names for callers that need none of their own."""
    return (f"{prefix}-{number}" for number in count())
