"""Study: what gets PPO in dreams stuck, and what sets it free?

The article's agent hovers or wanders at about 100 and never lands reliably. Each ingredient is added to the defaults, and taken out of an agent that
has them all. Without "long horizon", dreams of "all" are cut after 20 steps. Arms that the claim names have ten seeds, the others five. The runs are
those of collapse.py.

    python ablations/local_optimum.py --seeds 0-9 --jobs 2
"""

from run import SHORT, More, Study, run_study

INGREDIENTS = {
    "no uncertainty": dict(uncertainty="none"),
    "heads (s, a)": dict(wm_heads="sa"),
    "newest data": dict(wm_newest=2000),
    "few refits": dict(wm_updates=50),  # a quarter of the model's updates; evaluations at the same steps as in all arms
    "fear of endings": dict(caution=0.0),
    "far sight at once": dict(gamma=0.998),
    "long dreams trusted": dict(good_lambda=0.99, grounding=0.0),  # a critic that knows dreams only
    "whole episodes": dict(gather_limit=0),
    "no greedy episodes": dict(gather_greedy=0.0),
}
ALL = {name: value for settings in INGREDIENTS.values() for name, value in settings.items()}
WITHOUT = {f"all but {name}": {k: v for k, v in ALL.items() if k not in settings} for name, settings in INGREDIENTS.items()}
ARMS = {"default": {}, **{f"+ {name}": settings for name, settings in INGREDIENTS.items()}}
ARMS |= {"+ short sight to the end": dict(good_gamma=0.99), "all": ALL, **WITHOUT, "all but long horizon": ALL | dict(horizon=20)}
CLAIMED = ["all", "+ far sight at once", "+ long dreams trusted", "+ whole episodes"]


def skip(arm: str, seed: int) -> bool:
    return 5 <= seed < 10 and arm not in ("default", *CLAIMED)


STUDY = Study(
    name="local_optimum",
    question="Which ingredients keep an agent that learns in dreams from landing, and which of them are enough by themselves?",
    claim="With all ingredients an agent returns less on the way than the default; so does the default with far sight at once, long dreams trusted, or whole episodes.",
    arms=ARMS,
    shared=SHORT,
    tests=[More("default", arm, "mean_return") for arm in CLAIMED],
    metric="mean_return",
    skip=skip,
)

if __name__ == "__main__":
    run_study(STUDY)
