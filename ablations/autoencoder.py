"""Study: does a denoising autoencoder know where the model is wrong (Boney et al., 2019), and better than the members' disagreement?

All arms have five members, so that they cost about the same. On held-out real steps of a finished run, "wrong" are the tenth with the largest
one-step error of the members' mean; an ROC's area is the probability that a wrong step has more of the uncertainty than another one.

    python ablations/autoencoder.py --seeds 0-9 --jobs 2
"""

import json
from pathlib import Path

import torch
from run import SHORT, More, Often, Study, load_model, run_study, stats

from world_model import judge, spread


def areas(run_dir: Path) -> dict:
    """Areas under the ROC of both uncertainties, where the run has both."""
    if json.loads((run_dir / "config.json").read_text())["uncertainty"] != "both":
        return dict.fromkeys(("roc_autoencoder", "roc_disagreement", "autoencoder_finds", "autoencoder_finds_more"))
    model, replay = load_model(run_dir)
    judged = judge(model, replay, *spread(replay.held_out.nonzero(), 4096))
    error = model.mean_over_numbers(((judged.expected.mean.mean(0) - judged.steps.next_obs) / model.change_scale.std).square())
    wrong = error > error.quantile(0.9)
    found = judged.unusual, judged.disagreement
    auto, dis = (float(stats.improvement_of(x[wrong].numpy(), x[~wrong].numpy())) for x in found)
    return dict(roc_autoencoder=auto, roc_disagreement=dis, autoencoder_finds=auto > 0.5, autoencoder_finds_more=auto > dis)


STUDY = Study(
    name="autoencoder",
    question="Does the error of an autoencoder find the states where the model is wrong, and does the agent gain from it?",
    claim="It finds them better than chance and better than disagreement does, in most runs; the agent returns more on the way than without any uncertainty.",
    arms={
        "disagreement": {},
        "none": dict(uncertainty="none"),
        "autoencoder": dict(uncertainty="autoencoder"),
        "autoencoder, weight 2": dict(uncertainty="autoencoder", wm_autoencoder=2.0),
        "both": dict(uncertainty="both"),
    },
    shared=SHORT,
    tests=[Often("both", "autoencoder_finds"), Often("both", "autoencoder_finds_more"), More("autoencoder", "none", "mean_return")],
    metric="mean_return",
    measure=torch.no_grad()(areas),
)

if __name__ == "__main__":
    run_study(STUDY)
