"""Study: action repeat (frame skip: Mnih et al., 2015). Is it what keeps agents in dreams from landing that they decide at every step?

With an action for each k real steps a model has a k-th of the steps to get wrong on the way to the ground, and what is drawn lasts long enough to
show what comes of it. A minibatch has a k-th of the steps as well, so that PPO takes as many gradient steps; one arm has that alone.

    python ablations/action_repeat.py --seeds 0-9 --jobs 2
"""

from run import SHORT, More, Study, run_study

STUDY = Study(
    name="action_repeat",
    question="Do agents in dreams learn better if each action is taken for several real steps?",
    claim="With each action taken for 4 real steps agents return more on the way than with one for each step, and not for their smaller minibatches.",
    arms={
        "1": {},
        "1, minibatch 512": dict(minibatch=512),
        "2": dict(action_repeat=2, minibatch=1024),
        "4": dict(action_repeat=4, minibatch=512),
    },
    shared=SHORT,
    tests=[More("4", "1", "mean_return"), More("4", "1, minibatch 512", "mean_return")],
    metric="mean_return",
    minutes={"1": 1.9, "1, minibatch 512": 2.2, "2": 1.2, "4": 0.8},
)

if __name__ == "__main__":
    run_study(STUDY)
