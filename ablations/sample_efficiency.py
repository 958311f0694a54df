"""Study: how many real steps does it take to solve LunarLander in dreams, and how many without a model? Both at the kit's defaults.

`steps` are the real steps to the first evaluation of 100 episodes with a mean of 200; where there was none, all that the run had.

    python ablations/sample_efficiency.py --seeds 0-9 --jobs 2
"""

import json
from pathlib import Path

from run import More, Often, Study, run_study


def steps(run_dir: Path) -> dict:
    summary = json.loads((run_dir / "summary.json").read_text())
    return dict(steps=summary["steps_to_solve"] or summary["real_steps"])


STUDY = Study(
    name="sample_efficiency",
    question="Does PPO in dreams solve LunarLander with fewer real steps than model-free PPO, and as surely?",
    claim="It needs fewer real steps, and is solved after 20,000 of them on most seeds.",
    arms={"dreams": dict(mode="simple"), "PPO": dict(mode="ppo")},
    tests=[More("PPO", "dreams", "steps"), Often("dreams", "solved")],
    minutes={"dreams": 5.0, "PPO": 1.7},
    measure=steps,
)

if __name__ == "__main__":
    run_study(STUDY)
