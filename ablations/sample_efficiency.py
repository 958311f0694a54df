"""Study: how many real steps does it take to solve LunarLander in dreams, and how many without a model? Both at the kit's defaults.

`steps_to_solve` are the real steps to the first evaluation of 100 episodes with a mean of 200; a run without one counts as the slowest of all.

    python ablations/sample_efficiency.py --seeds 0-9 --jobs 2
"""

from run import More, Often, Study, run_study

STUDY = Study(
    name="sample_efficiency",
    question="Does PPO in dreams solve LunarLander with fewer real steps than model-free PPO, and as surely?",
    claim="It needs fewer real steps, and is solved after 20,000 of them on most seeds.",
    arms={"dreams": dict(mode="simple"), "PPO": dict(mode="ppo")},
    tests=[More("PPO", "dreams", "steps_to_solve"), Often("dreams", "solved")],
    minutes={"dreams": 3.3, "PPO": 3.1},
    costs=("steps_to_solve",),
)

if __name__ == "__main__":
    run_study(STUDY)
