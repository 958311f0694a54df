"""Study: what should the network predict? The next observation, its change, or a derivative that is integrated (the article's open question).

python ablations/target.py --seeds 0-9 --jobs 2
"""

from run import SHORT, More, Study, run_study

STUDY = Study(
    name="target",
    question="Does it help to predict the change of an observation, or its derivative, rather than the next observation itself?",
    claim="Delta, the default, and ode both return more on the way than direct.",
    arms={target: dict(wm_target=target) for target in ("delta", "direct", "ode")},
    shared=SHORT,
    tests=[More("delta", "direct", "mean_return"), More("ode", "direct", "mean_return")],
    metric="mean_return",
    minutes={"delta": 1.9, "direct": 1.9, "ode": 3.4},
)

if __name__ == "__main__":
    run_study(STUDY)
