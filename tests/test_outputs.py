"""What the outputs say of themselves."""

import pytest

from jaxpaged.outputs import CompletionOutput, RequestMetrics, RequestOutput


@pytest.mark.parametrize(("reason", "finished"), [(None, False), ("stop", True), ("length", True), ("abort", True)])
def test_completion_is_finished_once_it_has_a_reason(reason, finished):
    assert CompletionOutput(0, "", [], finish_reason=reason).finished == finished


def test_times_are_unknown_until_they_happened():
    metrics = RequestMetrics(arrival_time=10.0)
    assert (metrics.time_in_queue, metrics.time_to_first_token) == (None, None)
    metrics.first_scheduled_time, metrics.first_token_time = 10.5, 12.0
    assert (metrics.time_in_queue, metrics.time_to_first_token) == (0.5, 2.0)


def test_misspelt_field_of_an_output_is_an_error():
    output = RequestOutput("a", None, [1])
    with pytest.raises(AttributeError):
        output.num_cached_token = 3  # type: ignore[attr-defined]
