"""Study: is model-free PPO on LunarLander straightforward? The article's first figure.

`schulman2017.json` holds Table 3 of Schulman et al. (2017); "tuned" are the defaults of --mode ppo.

    python ablations/model_free.py --seeds 0-9 --jobs 2
"""

from run import ROOT, More, Often, Study, run_study

STUDY = Study(
    name="model_free",
    question="Does model-free PPO with the defaults of Schulman et al. (2017) learn to land within a million real steps?",
    claim="It is solved on more than half of the seeds, and tuned settings score higher on the way.",
    arms={"schulman2017": dict(config=str(ROOT / "ablations" / "schulman2017.json")), "tuned": dict(mode="ppo")},
    shared=dict(total_steps=1_000_000),
    tests=[Often("schulman2017", "solved"), More("tuned", "schulman2017", "mean_return")],
    minutes={"schulman2017": 6.1, "tuned": 3.1},
)

if __name__ == "__main__":
    run_study(STUDY)
