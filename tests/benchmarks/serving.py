"""How many requests an endpoint answers: python tests/benchmarks/serving.py MODEL CLIPS

MODEL: the unpacked model.tar.gz of a training job. CLIPS: a folder of videos, searched for *.mp4.
Starts the model server of AWS's PyTorch images (see tests/scripts/serving) with 1, 2 and 4 workers,
and sends 200 requests with each number of clients, one in twenty of them bad. "Of one process": the
rate over that of one process and one thread without a server, measured just before. Lost: no
answer, or not the right one; a bad request is answered rightly with its 4xx.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import urllib3

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "scripts" / "serving")]
import inference  # noqa: E402
import server  # noqa: E402

REQUESTS = 200
BAD = [(b"no video", "video/mp4", 400), (b"{", "application/json", 400), (b"1", "text/csv", 415)]


def measured(url: str, clips: list[tuple[bytes, str]], clients: int) -> dict:
    """Requests per second, milliseconds at the 50th and 99th percentile, and how many were lost.

    clips: bytes and the label that each one gets. The percentiles are those of the good requests.
    """
    http = urllib3.PoolManager(maxsize=clients)

    def ask(i):
        good = i % 20 != 7
        body, label = clips[i % len(clips)]
        body, kind, status = (body, "video/mp4", 200) if good else BAD[i // 20 % len(BAD)]
        start = time.perf_counter()
        try:
            head = {"Content-Type": kind}
            answer = http.request("POST", url, body=body, headers=head, retries=False, timeout=120)
        except urllib3.exceptions.HTTPError:
            return good, time.perf_counter() - start, False
        seconds = time.perf_counter() - start
        right = answer.status == status and (not good or top_label(answer.json()) == label)
        return good, seconds, right

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    rate = REQUESTS / (time.perf_counter() - start)
    p50, p99 = np.percentile([1000 * seconds for good, seconds, _ in answers if good], [50, 99])
    return {"rate": rate, "p50": p50, "p99": p99, "lost": sum(not right for *_, right in answers)}


def top_label(result: dict) -> str:
    return result["labels"][int(np.mean(result["probabilities"], 0).argmax())]


def seconds_alone(file: Path, classifier: inference.Classifier) -> float:
    start = time.perf_counter()
    inference.classify_video(file, classifier)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("clips", type=Path)
    args = parser.parse_args()
    if reason := server.obstacle():
        sys.exit(reason)
    os.environ["SAGEMAKER_MODEL_SERVER_WORKERS"] = str(psutil.cpu_count())  # one thread
    classifier = inference.model_fn(args.model)
    files = sorted(args.clips.rglob("*.mp4"))[:40]
    labels = [top_label(inference.classify_video(file, classifier)) for file in files]
    clips = [(file.read_bytes(), label) for file, label in zip(files, labels, strict=True)]
    print(json.dumps({"cores": psutil.cpu_count(), "load before": os.getloadavg()[0]}))
    print("| workers | clients | requests/s | of one process | p50 ms | p99 ms | lost of 200 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    archive = server.write_artefact(args.model, Path(tempfile.mkdtemp()) / "model.tar.gz")
    for workers in (1, 2, 4):
        base = 1 / np.median([seconds_alone(file, classifier) for file in files])
        with server.running(archive, workers) as endpoint:
            measured(
                f"{endpoint.url}/invocations", clips, 4 * workers
            )  # until every worker is warm
            for clients in (1, 2, 8):
                m = measured(f"{endpoint.url}/invocations", clips, clients)
                print(
                    f"| {workers} | {clients} | {m['rate']:.1f} | {m['rate'] / base:.2f} | "
                    f"{m['p50']:.0f} | {m['p99']:.0f} | {m['lost']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
