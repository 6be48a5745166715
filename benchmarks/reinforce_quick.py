"""The story of a reward, small: base model, v1 (the letter e alone), v6 with KL; three seeds.

python benchmarks/reinforce_quick.py [seed ...]

Two idle CPU cores; three commands in one folder, as a reader types them, and an evaluation of the
base model on the same 256 held-out prompts. One raw row a seed in rows/reinforce_quick.jsonl;
`seconds` are those of the three commands, starting Python included.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import append, circumstances, last_values, ravine

STAGES = ["reinforce/quick_base", "reinforce/quick_v1", "reinforce/quick"]
KEPT = (
    "val/loss",
    "val/e",
    "val/frac_in_vocab",
    "val/jaccard_distance_nearest",
    "val/jaccard_distance_mean",
    "val/frac_unique_texts",
    "val/num_unique_words",
    "val/kl",
    "val/entropy",
    "val/reward",
)


def row(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        found, took, words = {}, {}, [f"--trainer.default_root_dir={folder}"]
        words += [f"--seed_everything={seed}", "--data.source=shakespeare"]
        base = [f"--model.base_checkpoint={folder}/reinforce/quick_base"]
        for stage in STAGES:
            start_s = time.perf_counter()
            ravine("fit", "--config", stage, *words, *(base if stage != STAGES[0] else []))
            took[stage] = round(time.perf_counter() - start_s, 1)
            found[stage] = kept(Path(folder, stage))
        ravine("validate", "--config", STAGES[2], *words, *base, "--trainer.name=judged")
        found["base"] = kept(Path(folder, "judged"))
        (file,) = Path(folder, STAGES[1]).rglob("*.ckpt")
        alarm_events = torch.load(file, weights_only=True)["callbacks"]["MetricAlert"]["alarms"]
    fractions = {
        k: v["val/frac_in_vocab"] / found["base"]["val/frac_in_vocab"]
        for k, v in found.items()
        if "val/frac_in_vocab" in v
    }
    busy = torch.get_num_threads() == 1 or os.getloadavg()[0] > (os.cpu_count() or 1) + 1
    return circumstances("reinforce/quick") | {
        "seed": seed,
        # on a machine that others use too, the row is for the quality alone
        "seconds": None if busy else round(sum(took.values()), 1),
        "threads": torch.get_num_threads(),
        "stages": took,
        "base/loss": found[STAGES[0]]["val/loss"],
        "v1/e": found[STAGES[1]]["val/e"],
        "v1/vocabulary_of_base": round(fractions[STAGES[1]], 4),
        "v6/e": found[STAGES[2]]["val/e"],
        "v6/vocabulary_of_base": round(fractions[STAGES[2]], 4),
        "v6/nearest_jaccard": found[STAGES[2]]["val/jaccard_distance_nearest"],
        "v6/distinct_words_of_base": round(
            found[STAGES[2]]["val/num_unique_words"] / found["base"]["val/num_unique_words"], 4
        ),
        "alarms": alarm_events,
        "all": found,
    }


def kept(folder: Path) -> dict[str, float]:
    (path,) = folder.rglob("metrics.csv")
    return {k: round(v, 5) for k, v in last_values(path).items() if k in KEPT}


if __name__ == "__main__":
    for number in map(int, sys.argv[1:] or ["0", "1", "2"]):
        append("reinforce_quick", row(number))
