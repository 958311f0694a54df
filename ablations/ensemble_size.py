"""Study: how many models does an agent need? One alone knows nothing of its uncertainty.

python ablations/ensemble_size.py --seeds 0-9 --jobs 2
"""

from run import SHORT, More, Study, run_study

STUDY = Study(
    name="ensemble_size",
    question="How many members does the ensemble need?",
    claim="Five members, the default, return more on the way than one, and so do three.",
    arms={str(size): dict(wm_ensemble=size) for size in (5, 1, 2, 3, 7)},
    shared=SHORT,
    tests=[More("5", "1", "mean_return"), More("3", "1", "mean_return")],
    metric="mean_return",
    minutes={"5": 1.9, "1": 1.4, "2": 1.3, "3": 1.5, "7": 2.4},
)

if __name__ == "__main__":
    run_study(STUDY)
