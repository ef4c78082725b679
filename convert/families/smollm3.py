"""SmolLM3: Llama where every fourth layer has no rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxpaged.convert.families import llama
from jaxpaged.convert.families.fields import Fields
from jaxpaged.model.spec import Decoder

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "no_rope_layer_interval": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config. In `no_rope_layers` a 1 says that the layer does have a rotary embedding."""
    c = Fields(config, DEFAULTS)
    decoder = llama.with_biases(llama.decoder(c), c)
    count = len(decoder.blocks)
    if "no_rope_layers" in c:
        rotated = c.switches("no_rope_layers", count)
    else:
        interval = c.size("no_rope_layer_interval")
        rotated = tuple((i + 1) % interval != 0 for i in range(count))
    decoder = llama.map_mixers(decoder, lambda i, a: a if rotated[i] else replace(a, rope=None))
    if not c.flag("use_sliding_window"):
        return decoder
    local = c.layer_types(count) if "layer_types" in c else tuple(not r for r in rotated)
    return llama.with_windows(decoder, local, c.maybe_size("sliding_window"))
