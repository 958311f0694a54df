"""Study: are results in dreams more sensitive to seed and settings than those of model-free PPO? The article's complaint.

Both methods run at half of their default length, twice as long as the median run with their defaults needs to be solved. Two arms of ten seeds change
nothing but the seed; in the two others each of twenty seeds also draws five settings that both methods have, uniformly on a logarithmic scale, from a
box of a factor of two either way around their defaults: what these show is sensitivity to seed and settings together.

Dreams have the settings that were the defaults when the rows were made.

    python ablations/sensitivity.py --seeds 0-19 --jobs 2
"""

import numpy as np
from run import THEN, More, Study, run_study

PPO = dict(lr=3e-4, minibatch=64, epochs=4, entropy_coef=0.01, clip=0.2)
DREAMS = dict(lr=1e-3, minibatch=2048, epochs=4, entropy_coef=0.003, clip=0.2)


def drawn(defaults: dict):
    """Settings of a seed: each default times 2 to the power of a number between -1 and 1."""

    def draw(seed: int) -> dict:
        factors = 2 ** np.random.default_rng(seed).uniform(-1, 1, len(defaults))
        return {name: type(x)(round(x * f) if type(x) is int else float(f"{x * f:.3g}")) for (name, x), f in zip(defaults.items(), factors)}

    return draw


SIMPLE, MODEL_FREE = dict(mode="simple", total_steps=10_000) | THEN, dict(mode="ppo", total_steps=500_000)

STUDY = Study(
    name="sensitivity",
    question="Do scores in dreams depend more on the seed, and more on seed and settings, than those of model-free PPO?",
    claim="Both: final scores in dreams are spread more widely over seeds, and over seeds and settings in the box.",
    arms={
        "dreams, seeds": SIMPLE,
        "PPO, seeds": MODEL_FREE,
        "dreams, settings": lambda seed: SIMPLE | drawn(DREAMS)(seed),
        "PPO, settings": lambda seed: MODEL_FREE | drawn(PPO)(seed),
    },
    tests=[More(f"dreams, {what}", f"PPO, {what}", spread=True) for what in ("seeds", "settings")],
    seeds="0-19",
    skip=lambda arm, seed: arm in ("dreams, seeds", "PPO, seeds") and 10 <= seed < 20,
    minutes={"dreams, seeds": 3.3, "PPO, seeds": 1.6, "dreams, settings": 3.5, "PPO, settings": 1.8},
)

if __name__ == "__main__":
    run_study(STUDY)
