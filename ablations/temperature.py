"""Study: the article's advice to scale the logits, so that the policy acts more randomly and finds its way out of local optima.

"warm gathering" draws actions at temperature 2 where the policy gathers data, "drawn gathering" at 1; by default three episodes of four are greedy.

    python ablations/temperature.py --seeds 0-9 --jobs 2
"""

from run import SHORT, More, Study, run_study

WARM = dict(temperature=2.0)  # where the policy dreams; the ratio of PPO knows of it
DRAWN = dict(gather_greedy=0.0)

STUDY = Study(
    name="temperature",
    question="Does a higher temperature of the policy get an agent out of hovering?",
    claim="Temperature 2 returns more on the way than temperature 1, the default, and so does warm gathering.",
    arms={
        "1": {},
        "2": WARM,
        "2, falling to 1": WARM | dict(temperature_end=1.0),
        "drawn gathering": DRAWN,
        "warm gathering": DRAWN | dict(gather_temperature=2.0),
    },
    shared=SHORT,
    tests=[More("2", "1", "mean_return"), More("warm gathering", "1", "mean_return")],
    metric="mean_return",
)

if __name__ == "__main__":
    run_study(STUDY)
