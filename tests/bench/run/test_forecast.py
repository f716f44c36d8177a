"""What a bench says that it will take."""

from __future__ import annotations

from memrewrite.bench.run.forecast import forecast


def test_a_forecast_is_compilations_and_steps() -> None:
    line = forecast(compilations=4, compile_s=10.0, steps=100, step_s=0.2)
    assert line == "this will take about 60 s: 4 compilations of 10 s and 100 steps of 0.2 s"
    assert "about 20 min:" in forecast(0, 0.0, 1200, 1.0)
    assert "about 2.0 h:" in forecast(0, 0.0, 7200, 1.0)
