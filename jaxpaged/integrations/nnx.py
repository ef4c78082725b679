"""A served model as a flax nnx Module: its variables are the params themselves, so a trainer's step needs no copy.

    model = Model(spec, params)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-5), wrt=nnx.Param)
    ...                                             # any nnx training step
    engine.update_params(model.to_params())

Weights of other nnx modules come through `trees.to_params`.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxpaged.integrations import trees
from jaxpaged.model.params import Params
from jaxpaged.model.spec import Decoder


class Model(nnx.Module):
    """A `Decoder` whose weights are `nnx.Param`s, in `params`, under our own names."""

    def __init__(self, spec: Decoder, params: Params, *, remat: bool = False) -> None:
        """Hold the given arrays, not copies. `remat`: see `Decoder.apply`."""
        self.spec = spec
        self.remat = remat
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(self, tokens: Any) -> Any:
        """float32 logits [..., T, V] of token ids [..., T]."""
        return self.spec.apply(self.to_params(), tokens, remat=self.remat)

    def to_params(self) -> Params:
        """The weights as they are now: the variables' own arrays, as an engine takes them."""
        return trees.to_params(nnx.state(self, nnx.Param), self.spec)
