"""Study: dynamic hyperparameters. Should dreams be as long as the model is good (Lambert et al., 2021, quoted by the article), or of a fixed length?

With --horizon 0 the open-loop error on held-out episodes decides, anew in each iteration. The default, 600, is as long as an iteration's dreams.

    python ablations/horizon.py --seeds 0-9 --jobs 2
"""

from run import SHORT, More, Study, run_study

STUDY = Study(
    name="horizon",
    question="Is a horizon driven by the model's error better than a fixed one?",
    claim="The driven horizon returns more on the way than dreams of 60 and than dreams of 600 steps.",
    arms={"600": {}, "60": dict(horizon=60), "driven": dict(horizon=0)},
    shared=SHORT,
    tests=[More("driven", "60", "mean_return"), More("driven", "600", "mean_return")],
    metric="mean_return",
)

if __name__ == "__main__":
    run_study(STUDY)
