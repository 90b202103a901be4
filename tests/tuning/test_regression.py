"""The regression on numbers whose truth is known."""

from __future__ import annotations

import numpy as np

from gptray.tuning.regression import Stage, sample_effects


def test_those_that_were_stopped_for_what_they_measured_bias_nothing() -> None:
    """The setting adds 0.5 at first and 0.3 later; of those that go on it seems to take away."""
    rng = np.random.default_rng(0)
    setting = (np.arange(400) % 2).astype(float)
    own = np.repeat(rng.normal(size=200), 2)
    first = 0.5 * setting + own
    goes_on = first < np.median(first)
    second = 0.8 * setting + own + 0.1 * rng.normal(size=400)
    naive = second[goes_on & (setting > 0)].mean() - second[goes_on & (setting < 1)].mean() - 0.5
    assert naive < 0.1
    stages = [
        Stage(np.ones(400, bool), first[:, None]),
        Stage(goes_on, np.where(goes_on, second, np.nan)[:, None]),
    ]
    draws = sample_effects(setting[:, None], np.zeros(1, np.intp), stages, seed=0)
    assert draws[0].shape == draws[1].shape and draws[0].shape[1:] == (1, 1)
    at_first = np.quantile(draws[0], (0.025, 0.975))
    later = np.quantile(draws[1] - draws[0], (0.025, 0.975))
    assert at_first[0] <= 0.5 <= at_first[1]
    assert 0.2 < later[0] <= 0.3 <= later[1] < 0.4
