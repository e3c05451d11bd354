"""How good the intervals of long videos are: python tests/benchmarks/segments.py MODEL

MODEL: the unpacked model.tar.gz of the series' job. Eight drawn minutes (seeds 101 to 108, which
chose no setting), judged as the guide watch_long_videos does it; a found interval is right if it
overlaps a true one by half or more (IoU 0.5), one to one.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("scripts", "notebooks")]
import inference  # noqa: E402
from local_mode import clips as drawn  # noqa: E402
from tutorial.results import right_intervals  # noqa: E402

LABEL = "raising_hand"
SETTINGS = {"chosen": (0.8, 3), "threshold 0.5": (0.5, 3), "not smoothed": (0.8, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a fine-tuned model")
    model = parser.parse_args().model
    classifier = inference.load_classifier(model)
    counts = {name: [0, 0, 0] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(101, 109):
            path = os.path.join(folder, f"{seed}.mp4")
            true = drawn.draw_long_video(path, seed)
            for name, (threshold, smooth) in SETTINGS.items():
                how = {"threshold": threshold, "smooth": smooth}
                result = inference.classify_video(path, classifier, **how)
                found = [i for i in result["intervals"] if i["label"] == LABEL]
                parts = right_intervals(found, true), len(found), len(true)
                counts[name] = [a + b for a, b in zip(counts[name], parts, strict=True)]
    print("| settings | right | found | true | precision | recall | F1 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (right, found, true) in counts.items():
        scores = right / max(1, found), right / true, 2 * right / (found + true)
        print(f"| {name} | {right} | {found} | {true} |", *(f"{s:.2f} |" for s in scores))


if __name__ == "__main__":
    main()
