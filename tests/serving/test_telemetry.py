"""What is counted of a request's tokens."""

from __future__ import annotations

import pytest

from gptray.generation.sampling import Drawn
from gptray.serving.endpoint import Endpoint
from gptray.serving.streams import Update
from gptray.serving.telemetry import Stopwatch, Telemetry


@pytest.mark.parametrize("sizes", [(1, 6), (7,), (3, 4), (1, 1, 5)])
def test_every_token_but_the_first_is_timed_however_they_arrive(sizes: tuple[int, ...]) -> None:
    telemetry = Telemetry(Endpoint())
    stopwatch = Stopwatch(telemetry)
    for size in sizes:
        stopwatch.take(Update(0, "", tuple(map(Drawn, range(size))), (), None, None))
    text = telemetry.text().decode()
    assert "gptray_per_token_seconds_count 6.0" in text
    assert "gptray_first_token_seconds_count 1.0" in text
