"""The engine's configuration: checked once, with both numbers."""

import pytest

from jaxpaged.config import EngineConfig
from jaxpaged.errors import ConfigError

WRONG = [
    ({"page_size": 0}, "page_size is 0; it must be a whole number from 1 to 1,024"),
    ({"page_size": 12}, "page_size is 12; it must be a power of two, such as 16"),
    ({"num_pages": 1}, "num_pages is 1; it must be a whole number of at least 2"),
    ({"memory_utilization": 0}, "memory_utilization is 0; it must be a finite number above 0 and at most 1"),
    ({"memory_utilization": float("nan")}, "memory_utilization is nan"),
    ({"host_cache_gb": -1}, "host_cache_gb is -1; it must be a finite number of at least 0"),
    ({"host_cache_gb": 4, "enable_prefix_caching": False}, "host_cache_gb is 4 but enable_prefix_caching is False"),
    ({"max_model_len": 0}, "max_model_len is 0"),
    ({"max_num_seqs": None}, "max_num_seqs is None; it must be a whole number of at least 1"),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"warmup": "yes"}, "warmup is 'yes'; it must be True or False"),
    ({"cache_dtype": "int3"}, "cache_dtype is 'int3'; known: auto, float32, bfloat16, float16, int8, fp8"),
    ({"attention_backend": "cuda"}, "attention_backend is 'cuda'; known: auto, reference, triton, mosaic"),
    ({"compilation_cache_dir": 3}, "compilation_cache_dir is 3; it must be a path"),
    ({"pagesize": 16}, "EngineConfig has no field 'pagesize'; did you mean 'page_size'?"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[repr(given) for given, _ in WRONG])
def test_wrong_value_is_one_line_with_value_and_range(given, message):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pool_too_small_for_one_sequence_names_what_would_fit():
    with pytest.raises(ConfigError) as caught:
        EngineConfig(num_pages=4, max_model_len=100)
    assert str(caught.value) == (
        "num_pages=4 holds 48 tokens but max_model_len is 100; raise num_pages to 8 or lower max_model_len to 48"
    )


@pytest.mark.parametrize(("num_pages", "max_model_len"), [(8, 100), (4, 48)])
def test_the_numbers_that_the_error_proposes_are_accepted(num_pages, max_model_len):
    assert EngineConfig(num_pages=num_pages, max_model_len=max_model_len).num_pages == num_pages
