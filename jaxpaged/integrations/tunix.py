"""Rollouts for google-tunix: its learners train a `Policy`, and an engine here answers with the same arrays.

    policy = Policy(spec, params)
    cluster = RLCluster(actor=policy, cluster_config=ClusterConfig(rollout_engine=Rollout, ...), ...)

A `Policy` is `nnx.Model` with the call that Tunix makes. An actor of another kind will do where
`functools.partial(Rollout, spec=..., family=...)` says what its variables are (see `trees.to_params`). Log
probabilities are the model's own, those at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput

from jaxpaged.config import EngineConfig
from jaxpaged.errors import ConfigError, RequestError
from jaxpaged.functional import score
from jaxpaged.integrations import trees
from jaxpaged.integrations.nnx import Model
from jaxpaged.llm import LLM
from jaxpaged.model.params import Params
from jaxpaged.model.spec import Decoder
from jaxpaged.outputs import CompletionOutput
from jaxpaged.sampling_params import SamplingParams


class Policy(Model):
    """A model that Tunix can train: rows are padded on both sides, and a mask says where."""

    def __call__(  # type: ignore[override]
        self, input_tokens: jax.Array, positions: Any, cache: Any, attention_mask: jax.Array | None, **rest: Any
    ) -> tuple[jax.Array, None]:
        """(logits [B, T, V], None). `attention_mask` [B, T, T] is causal; its last row tells the padding."""
        del positions, rest
        if cache is not None or attention_mask is None:
            raise ConfigError("a Policy has neither a cache of its own nor packed sequences; pass an attention_mask")
        first = jnp.argmax(attention_mask[:, -1], -1)
        logits = super().__call__(_rolled(input_tokens, first))
        return _rolled(logits, -first), None


class Rollout(BaseRollout):  # type: ignore[misc]  # Tunix ships no types
    """Tunix's `BaseRollout` over an engine that holds the actor's arrays."""

    def __init__(
        self,
        *,
        rollout_actor: nnx.Module,
        tokenizer: Any,
        rollout_config: RolloutConfig,
        mesh: Any = None,
        spec: Decoder | None = None,
        family: str | None = None,
        engine_config: EngineConfig | None = None,
    ) -> None:
        """`spec` and `family` tell what an actor that is no `Policy` computes and how its variables are named.

        Without an `engine_config` sequences may be as long as `rollout_config` lets them become.
        """
        del mesh  # arrays stay where the actor's lie
        spec = spec or (rollout_actor.spec if isinstance(rollout_actor, Model) else None)
        if spec is None:
            raise ConfigError(f"the actor is a {type(rollout_actor).__name__}; give Rollout its spec and family")
        self._spec, self._family = spec, family
        self._actor, self._tokenizer = rollout_actor, tokenizer
        longest = rollout_config.max_prompt_length + rollout_config.max_tokens_to_generate
        config = engine_config or EngineConfig(max_model_len=min(longest, spec.max_positions), warmup=False)
        self._seen = self._actor_params()
        self.llm = LLM((spec, self._seen), config=config)
        self._score = jax.jit(partial(score, spec=spec))

    def generate(self, prompts: Sequence[Any], rollout_config: RolloutConfig, **kwargs: Any) -> RolloutOutput:
        """An answer to each prompt, text or token ids; equal prompts get answers of their own."""
        del kwargs
        self._follow_actor()
        encoded = [self._encode(p) if isinstance(p, str) else list(p) for p in prompts]
        width = rollout_config.max_prompt_length
        if (longest := max(map(len, encoded))) > width:
            raise RequestError(f"a prompt has {longest:,} tokens but max_prompt_length is {width:,}; raise it")
        params = SamplingParams(
            max_tokens=rollout_config.max_tokens_to_generate,
            temperature=rollout_config.temperature,
            top_p=rollout_config.top_p or 1.0,
            top_k=rollout_config.top_k or 0,
            stop_token_ids=rollout_config.eos_tokens or [self.eos_id()],
            logprobs=0 if rollout_config.return_logprobs else None,
            detokenize=False,
        )
        seeds = _seeds(rollout_config.seed, len(encoded))
        each = [replace(params, seed=seed) for seed in seeds] if seeds else params
        outputs = [output.outputs[0] for output in self.llm.generate(encoded, each, use_tqdm=False)]
        padded = [[self.pad_id()] * (width - len(ids)) + ids for ids in encoded]
        return RolloutOutput(
            text=[self._text(output) for output in outputs],
            logits=None,
            tokens=[np.asarray(output.token_ids, np.int32) for output in outputs],
            left_padded_prompt_tokens=np.asarray(padded, np.int32),
            logprobs=[_logprobs(output) for output in outputs] if rollout_config.return_logprobs else None,
        )

    def get_per_token_logps(self, prompt_tokens: jax.Array, completion_tokens: jax.Array) -> jax.Array:
        """log p of every completion token [B, C], 0 where padded; the prompts [B, P] are padded on the left."""
        self._follow_actor()
        tokens = jnp.concatenate([prompt_tokens, completion_tokens], 1).astype(jnp.int32)
        is_real = tokens != self.pad_id()
        first = jnp.argmax(is_real, -1)
        lengths = jnp.sum(is_real, -1, dtype=jnp.int32)
        logps = self._score(self.llm.engine.params, _rolled(tokens, first), lengths)
        return _rolled(jnp.pad(logps, ((0, 0), (1, 0))), -first)[:, prompt_tokens.shape[1] :]

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Answer with these variables from now on: the arrays themselves, where they lie as the old ones do."""
        del filter_types
        self.llm.engine.update_params(trees.to_params(params, self._spec, self._family))

    def pad_id(self) -> int:
        """The tokenizer's."""
        return int(self._tokenizer.pad_id())

    def eos_id(self) -> int:
        """The tokenizer's."""
        return int(self._tokenizer.eos_id())

    def model(self) -> nnx.Module:
        """The actor."""
        return self._actor

    def _actor_params(self) -> Params:
        return trees.to_params(nnx.state(self._actor, nnx.Param), self._spec, self._family)

    def _follow_actor(self) -> None:
        """Where actor and rollout share a module Tunix calls no `update_params`: the variables just change."""
        now = self._actor_params()
        if any(a is not b for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(self._seen), strict=True)):
            self._seen = now
            self.llm.engine.update_params(now)

    def _encode(self, prompt: str) -> list[int]:
        bos = self._tokenizer.bos_id()
        ids: list[int] = [bos] * bool(bos) + list(self._tokenizer.encode(prompt))
        return ids[1:] if ids[:2] == [bos, bos] else ids

    def _text(self, output: CompletionOutput) -> str:
        ended = output.finish_reason == "stop"
        return str(self._tokenizer.decode(output.token_ids[:-1] if ended else output.token_ids))


def _rolled(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Row b of x [B, T, ...] moved left by shift[b], its head put behind its tail."""
    return jax.vmap(lambda row, by: jnp.roll(row, -by, 0))(x, shift)


def _seeds(seed: Any, count: int) -> list[int]:
    """A seed for each of `count` requests; none where none was given, and the engine draws its own."""
    if seed is None:
        return []
    words = jax.random.key_data(seed) if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) else jnp.ravel(seed)
    base = np.random.SeedSequence(np.asarray(words, np.uint32).tolist())
    return [int(one) for one in base.generate_state(count, np.uint64) >> np.uint64(1)]


def _logprobs(output: CompletionOutput) -> np.ndarray:
    entries = zip(output.token_ids, output.logprobs or (), strict=True)
    return np.asarray([entry[token].logprob for token, entry in entries], np.float32)
