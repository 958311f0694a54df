"""Study: the article's advice to scale the logits, so that the policy acts more randomly and finds its way out of local optima.

Hot stretches heat the policy now and then where it gathers data, and only there.

    python ablations/temperature.py --seeds 0-9 --jobs 2
"""

from run import More, Study, run_study

WARM = dict(temperature=2.0, gather_temperature=2.0)  # the ratio of PPO knows of it

STUDY = Study(
    name="temperature",
    question="Does a higher temperature of the policy get an agent out of hovering?",
    claim="Temperature 2 returns more on the way than temperature 1, the default, and so do hot stretches.",
    arms={"1": {}, "2": WARM, "2, falling to 1": WARM | dict(temperature_end=1.0), "hot stretches": dict(hot_temperature=3.0)},
    shared=dict(mode="simple", total_steps=10_000),
    tests=[More("2", "1", "mean_return"), More("hot stretches", "1", "mean_return")],
    metric="mean_return",
)

if __name__ == "__main__":
    run_study(STUDY)
