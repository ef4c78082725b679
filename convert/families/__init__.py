"""The families of checkpoints we read, by HF `model_type`. A new one is a file here and a line in FAMILIES."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.convert.families import (
    deepseek,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    olmoe,
    opt,
    phi,
    phi3,
    qwen,
    qwen_moe,
    smollm3,
)
from jaxpaged.convert.rules import Rule
from jaxpaged.errors import CheckpointError
from jaxpaged.model.spec import Decoder


@dataclass(frozen=True)
class Family:
    """Checkpoints that share HF names.

    `spec` reads a config.json, `rules` says where every leaf comes from, given the names of the checkpoint's tensors.
    `ignored` is a pattern of names that hold no weights of the language model. With `more_layers` checkpoints may have
    layers past the model's own, which guess tokens ahead and are not read.
    """

    spec: Callable[[Mapping[str, Any]], Decoder]
    rules: Callable[[Decoder, Collection[str]], list[Rule]]
    ignored: str = r"\.rotary_emb\.inv_freq$"
    more_layers: bool = False

    def ignores(self, name: str, spec: Decoder) -> bool:
        """Whether a tensor that no rule reads may be left where it is: buffers, and the copy of a tied embedding."""
        layer = re.match(r"model\.layers\.(\d+)\.", name) if self.more_layers else None
        if layer is not None and int(layer[1]) >= len(spec.blocks):
            return True
        return bool(re.search(self.ignored, name)) or (
            spec.tied_head and name.endswith(("lm_head.weight", "embed_out.weight"))
        )


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(deepseek.v2_spec, deepseek.rules),
    "deepseek_v3": Family(deepseek.v3_spec, deepseek.rules, more_layers=True),
    "gemma": Family(gemma.gemma_spec, llama.rules),
    "gemma2": Family(gemma.gemma2_spec, gemma.sandwich_rules),
    "gemma3": Family(
        gemma.gemma3_multimodal_spec,
        gemma.gemma3_multimodal_rules,
        r"(^|\.)(vision_tower|multi_modal_projector)\.|\.inv_freq$",
    ),
    "gemma3_text": Family(gemma.gemma3_spec, gemma.sandwich_rules),
    "gpt2": Family(gpt2.spec, gpt2.rules, r"\.attn\.(masked_)?bias$"),
    "gpt_neox": Family(gpt_neox.spec, gpt_neox.rules, r"\.attention\.(masked_)?bias$|\.rotary_emb\.inv_freq$"),
    "llama": Family(llama.spec, llama.rules),
    "mistral": Family(mistral.spec, llama.rules),
    "mixtral": Family(mixtral.spec, mixtral.rules),
    "olmoe": Family(olmoe.spec, qwen_moe.rules),
    "opt": Family(opt.spec, opt.rules),
    "phi": Family(phi.spec, phi.rules),
    "phi3": Family(phi3.spec, phi3.rules),
    "qwen2": Family(qwen.qwen2_spec, llama.rules),
    "qwen2_moe": Family(qwen_moe.qwen2_spec, qwen_moe.rules),
    "qwen3": Family(qwen.qwen3_spec, llama.rules),
    "qwen3_moe": Family(qwen_moe.qwen3_spec, qwen_moe.rules),
    "smollm3": Family(smollm3.spec, llama.rules),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of an HF config. Raises CheckpointError, listing the known ones, where there is none."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"config.json: model_type = {config.get('model_type')!r} is not a known architecture; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    return family
