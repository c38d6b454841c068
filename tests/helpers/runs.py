"""What run directories say."""

import json
from pathlib import Path

# Names of the official code's metrics: of an optimizer step, and of a prompt batch.
OFFICIAL = {"epoch", "global_step", "train_loss", "train_ratio_win", "train_ratio_lose",
            "train_win_prob_policy", "train_win_prob_ref", "train_lose_prob_policy", "train_lose_prob_ref",
            "implicit_acc", "train_margin", "lr"}
OFFICIAL_BATCH = {"preference_scores_mean", "preference_scores_std", "total_valid_samples_num",
                  "even_large_noise_samples_num", "large_noise_samples_num", "mid_noise_samples_num",
                  "small_noise_samples_num"}


def rows(run: Path, kind: str = "train") -> list[dict]:
    """Return a run's metrics of a kind."""
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if row["kind"] == kind]
