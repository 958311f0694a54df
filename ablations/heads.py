"""Study: do reward and ending have to see where a step leads?

The article's model predicts the reward from (obs, action). In many tasks it depends on next_obs as well. Does it matter to the policy?

    python ablations/heads.py --seeds 0-9 --jobs 2
"""

from run import SHORT, More, Study, run_study

STUDY = Study(
    name="heads",
    question="Does it matter to the policy whether reward and ending are predicted from (obs, action) or from (obs, action, next_obs)?",
    claim="With next_obs, the default, the final score is higher.",
    arms={"sas": {}, "sa": dict(wm_heads="sa")},
    shared=SHORT,
    tests=[More("sas", "sa")],
)

if __name__ == "__main__":
    run_study(STUDY)
