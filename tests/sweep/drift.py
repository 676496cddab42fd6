"""How often a sweep's verdict is wrong on a machine that drifts: `python -m tests.sweep.drift` prints a table.

Times of configurations, measured in rounds forth and back as `sweep.runner` does, with noise and a drift of the machine
in units of the noise's deviation. A false alarm chooses one of configurations that are alike. Power is the share of
sweeps that choose the last of them where it is better by three deviations.
"""

import sys
from itertools import product

import numpy as np

from sweep.settings import SweepConfig
from sweep.verdict import decide

DEVIATION = 0.01  # of one repeat; the level is 1
DRIFT, GAIN = 4, 3  # in deviations
SHAPES = {
    "none": lambda x, draw: 0 * x,
    "linear": lambda x, draw: x,
    "warming up": lambda x, draw: 1 - np.exp(-5 * x),
    "a step": lambda x, draw: 1.0 * (x > draw.uniform()),
    "a wave": lambda x, draw: 0.5 * np.sin(2 * np.pi * (draw.uniform(0.5, 2) * x + draw.uniform())),
    "a walk": lambda x, draw: np.cumsum(draw.normal(0, len(x) ** -0.5, len(x))),
}


def rows_of(levels):
    """The rows of a sweep with these levels [repeats, configurations]; the first configuration is the default."""
    return [
        {
            "configuration": f"c{number}",
            "overrides": [f"c{number}"],
            "load": "1 user",
            "status": "ok",
            "together": "now",
            "repeats": [{"tpot_p50_ms": level} for level in column],
        }
        for number, column in enumerate(levels.T)
    ]


def chosen(shape, repeats, configurations, gain, draw):
    """Whether a simulated sweep chooses another configuration than the first."""
    times = np.arange(repeats * configurations).reshape(repeats, configurations)
    times[1::2] = times[1::2, ::-1]  # back
    drift = DRIFT * SHAPES[shape](np.linspace(0, 1, times.size), draw)[times]
    noise = draw.standard_normal(times.shape)
    better = gain * (np.arange(configurations) == configurations - 1)
    rows = rows_of(1 + DEVIATION * (drift + noise - better))
    return decide(rows, SweepConfig(worth=0.0)).chosen is not rows[0]


def share_chosen(trials, shape, configurations, gain, repeats=SweepConfig.repeats):
    draw = np.random.default_rng([len(shape), configurations, repeats])
    return np.mean([chosen(shape, repeats, configurations, gain, draw) for _ in range(trials)])


def main():
    trials = int(sys.argv[1]) if sys.argv[1:] else 5000
    print("repeats  configurations  drift        false alarms  power")
    for repeats, configurations, shape in product((4, 6), (2, 3, 6), SHAPES):
        alarms, power = (share_chosen(trials, shape, configurations, gain, repeats) for gain in (0, GAIN))
        print(f"{repeats:7}  {configurations:14}  {shape:11}  {alarms:12.1%}  {power:5.0%}")


if __name__ == "__main__":
    main()
