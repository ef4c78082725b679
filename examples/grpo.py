"""Reinforcement learning with a live engine: GRPO (arXiv 2402.03300) on a task that a program can check.

`python examples/grpo.py [STEPS] [SEED] [PLOT.png]`. The trainer's arrays are the engine's weights: after each update
they are handed over, not copied. With `batch_invariant` the trainer's logprobs are the sampler's to the last bit, so
before an update every ratio pi_new / pi_old is 1. The task: say the prompt's last token again, eight times.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpaged import Engine, EngineConfig, SamplingParams
from jaxpaged.functional import score
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

VOCAB, PROMPT_LEN, ANSWER_LEN, NUM_PROMPTS, GROUP = 12, 4, 8, 8, 16
CLIP = 0.2

norm = Norm("rms", 1e-5)
block = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e3, 8)), Mlp(64, "silu"), norm)
SPEC = Decoder(VOCAB, 32, 32, (block,) * 2, norm, 32, tied_head=False)


class Rollouts(NamedTuple):
    """What the engine said: N answers, each after its prompt."""

    tokens: jax.Array  # int32 [N, PROMPT_LEN + ANSWER_LEN]
    logprobs: jax.Array  # float32 [N, ANSWER_LEN], of the sampler
    rewards: jax.Array  # float32 [N]


def sample(engine: Engine, prompts: np.ndarray, seed: int) -> Rollouts:
    """GROUP answers to every prompt, at temperature 1, with the sampler's own log probabilities."""
    for index, prompt in enumerate(prompts):
        params = SamplingParams(n=GROUP, max_tokens=ANSWER_LEN, seed=seed * NUM_PROMPTS + index, logprobs=0)
        engine.add_request(str(index), prompt.tolist(), params, output_kind="final")
    done: dict[int, Any] = {}
    while engine.has_unfinished:
        done |= {int(output.request_id): output for output in engine.step()}
    tokens, logprobs, rewards = [], [], []
    for index in range(len(prompts)):
        for answer in done[index].outputs:
            tokens.append([*prompts[index].tolist(), *answer.token_ids])
            logprobs.append([e[t].logprob for t, e in zip(answer.token_ids, answer.logprobs, strict=True)])
            rewards.append(np.mean(np.asarray(answer.token_ids) == prompts[index][-1]))
    return Rollouts(jnp.asarray(tokens), jnp.asarray(logprobs), jnp.asarray(rewards, jnp.float32))


def loss(params: Any, rollouts: Rollouts) -> tuple[jax.Array, jax.Array]:
    """GRPO's clipped objective, and every ratio pi_new / pi_old."""
    grouped = rollouts.rewards.reshape(NUM_PROMPTS, GROUP)
    spread = grouped.std(1, keepdims=True) + 1e-4
    advantage = ((grouped - grouped.mean(1, keepdims=True)) / spread).reshape(-1, 1)
    lengths = jnp.full(len(rollouts.tokens), PROMPT_LEN + ANSWER_LEN, jnp.int32)
    new = score(params, rollouts.tokens, lengths, spec=SPEC, batch_invariant=True)[:, PROMPT_LEN - 1 :]
    ratio = jnp.exp(new - rollouts.logprobs)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    return -jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage)), ratio


def train(num_steps: int, seed: int) -> tuple[list[float], list[float]]:
    """Mean reward of each step, and how far the first ratios were from 1."""
    params = dummy_params(SPEC, seed)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)
    most = NUM_PROMPTS * GROUP
    config = EngineConfig(max_num_seqs=most, num_pages=512, page_size=4, batch_invariant=True, warmup=False)
    engine = Engine(SPEC, params, config)

    @jax.jit
    def update(params: Any, state: Any, rollouts: Rollouts) -> tuple[Any, Any, jax.Array]:
        gradients, ratios = jax.grad(loss, has_aux=True)(params, rollouts)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, jnp.max(jnp.abs(ratios - 1))

    rng = np.random.default_rng(seed)
    rewards, drifts = [], []
    for step in range(num_steps):
        prompts = rng.integers(0, VOCAB, (NUM_PROMPTS, PROMPT_LEN))
        rollouts = sample(engine, prompts, seed * 1_000_003 + step)
        params, state, drift = update(params, state, rollouts)
        engine.update_params(params)
        rewards.append(float(rollouts.rewards.mean()))
        drifts.append(float(drift))
        if step % 10 == 9:
            print(f"step {step + 1:3}   mean reward of the last ten {np.mean(rewards[-10:]):.3f}")
    return rewards, drifts


def main() -> None:
    """Train, say what came of it, draw it where a path was given."""
    num_steps, seed = (int(arg) for arg in (sys.argv[1:3] + ["150", "0"][len(sys.argv[1:3]) :]))
    rewards, drifts = train(num_steps, seed)
    print(f"mean reward {np.mean(rewards[:10]):.3f} at first, {np.mean(rewards[-10:]):.3f} at last")
    print(f"largest |ratio - 1| before an update {max(drifts):.1e}")
    if len(sys.argv) > 3:
        draw(rewards, sys.argv[3])


def draw(rewards: list[float], path: str) -> None:
    """Save a picture of the mean reward, step by step and over ten steps."""
    from matplotlib.figure import Figure  # jaxpaged[plot]

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    axes.plot(rewards, color="0.75", label="of a step")
    smooth = np.convolve(rewards, np.full(10, 0.1), "valid")
    axes.plot(np.arange(len(smooth)) + 9, smooth, label="of ten steps")
    axes.axhline(1 / VOCAB, color="0.5", linestyle=":", label="by chance")
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
