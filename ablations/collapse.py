"""Study: what makes the return collapse, and does the model's accuracy collapse with it?

The article: "the agent's rapid initial improvement can suddenly be followed by a collapse in model accuracy and agent reward". `fall` is how far
evaluations, smoothed over three, fell from their maximum once that was 100 above the first; `model_collapsed` is whether the median open-loop error
on held-out episodes was twice as large around the lowest point as around that maximum. Both are this page's own measures, not the outcome
"collapsed" of a run's summary, which is of its final score. The runs are those of local_optimum.py.

    python ablations/collapse.py --seeds 0-9 --jobs 2
"""

import json
from pathlib import Path

import numpy as np
from local_optimum import ARMS, skip
from run import SHORT, More, Often, Study, descent, run_study


def model_collapse(run_dir: Path) -> dict:
    """Whether the return fell by 150 or more, and the model's error was twice as large at the low point as at the maximum before it."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps, scores = np.array([(row["real_steps"], row["eval/return_mean"]) for row in rows if "eval/return_mean" in row]).T
    if len(scores) < 3:
        return dict(fell=False, model_collapsed=False)
    smooth, depth = descent(scores)
    low = int(depth.argmax())
    high = int(smooth[: low + 1].argmax())

    def error(at: int) -> float:  # a smoothed point covers three evaluations; NaN where nothing is measured in between
        errors = [
            row["wm/error_openloop"] for row in rows if steps[at] <= row["real_steps"] <= steps[at + 2] and row.get("wm/error_openloop")
        ]
        return float(np.median(errors)) if errors else np.nan

    fell = bool(depth[low] >= 150)
    return dict(fell=fell, model_collapsed=fell and bool(error(low) >= 2 * error(high)))


STUDY = Study(
    name="collapse",
    question="Which ingredients make the return collapse after a first improvement, and does the model's accuracy collapse at the same time?",
    claim="With all ingredients the return falls further than with the defaults, in most runs by 150 or more, and in most runs the model's error doubles meanwhile.",
    arms=ARMS,
    shared=SHORT,
    tests=[More("all", "default", "fall"), Often("all", "fell"), Often("all", "model_collapsed")],
    metric="fall",
    measure=model_collapse,
    skip=skip,
)

if __name__ == "__main__":
    run_study(STUDY)
