"""Study: does a recurrent model help (the article's first plan)? With wind, whose phase the observation does not show, and without.

python ablations/memory.py --seeds 0-9 --jobs 2
"""

from run import SHORT, More, Study, run_study

WIND = dict(env_id="ablations.wind:LunarLanderWind-v3")
GRU = dict(wm_memory="gru")

STUDY = Study(
    name="memory",
    question="Does the model need a memory?",
    claim="Where there is wind, an agent in the dreams of a model with a memory returns more on the way.",
    arms={"no wind": {}, "no wind, GRU": GRU, "wind": WIND, "wind, GRU": WIND | GRU},
    shared=SHORT,
    tests=[More("wind, GRU", "wind", "mean_return")],
    metric="mean_return",
    minutes={"no wind": 1.9, "no wind, GRU": 3.8, "wind": 1.9, "wind, GRU": 3.8},
)

if __name__ == "__main__":
    run_study(STUDY)
