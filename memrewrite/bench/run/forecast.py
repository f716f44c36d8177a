"""What a bench will take on this machine, said before most of it has run."""

from __future__ import annotations


def forecast(compilations: int, compile_s: float, steps: int, step_s: float) -> str:
    """One line: the time in all, and what it is made of.

    compile_s, step_s: seconds of the first compilation and step; others are taken to be alike.
    """
    total = compilations * compile_s + steps * step_s
    return (
        f"this will take about {_duration(total)}: {compilations} compilations of "
        f"{compile_s:.0f} s and {steps:,} steps of {step_s:.2g} s"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
