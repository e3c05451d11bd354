"""How many requests an endpoint answers: python tests/benchmarks/serving.py MODEL CLIPS

MODEL: the unpacked model.tar.gz of a training job. CLIPS: a folder of videos, searched for *.mp4.
Starts the app in Ray Serve and the server of scripts/serving/server.py, each with 1 and 2 workers,
and sends 200 requests with each number of clients, one in twenty of them bad. "Of one process": the
rate over that of one process and one thread without a server, measured just before. Start: seconds
until it is healthy. MiB: of all its processes after the requests, each shared page divided by the
number of processes that share it (Linux's PSS). Lost: no answer, or not the right one; a bad
request is answered rightly with its 4xx.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import urllib3

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "scripts" / "serving")]
import inference  # noqa: E402
import servers  # noqa: E402

REQUESTS = 200
BAD = [(b"no video", "video/mp4", 400), (b"{", "application/json", 400), (b"1", "text/csv", 415)]


def measured(url: str, clips: list[tuple[bytes, str]], clients: int, requests=REQUESTS) -> dict:
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
        answers = list(pool.map(ask, range(requests)))
    rate = requests / (time.perf_counter() - start)
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
    os.environ["WORKERS"] = str(psutil.cpu_count())  # one thread
    classifier = inference.model_fn(args.model)
    files = sorted(args.clips.rglob("*.mp4"))[:40]
    labels = [top_label(inference.classify_video(file, classifier)) for file in files]
    clips = [(file.read_bytes(), label) for file, label in zip(files, labels, strict=True)]
    print(json.dumps({"cores": psutil.cpu_count(), "load before": os.getloadavg()[0]}))
    print(
        "| server | workers | start s | MiB | clients | requests/s | of one process | p50 ms "
        "| p99 ms | lost of 200 |"
    )
    print("|" + " --- |" * 10)
    for workers in (1, 2):
        for kind in ("ray", "own"):
            base = 1 / np.median([seconds_alone(file, classifier) for file in files])
            begin = time.perf_counter()
            with servers.running(kind, args.model, WORKERS=workers) as endpoint:
                start = time.perf_counter() - begin
                measured(endpoint.url, clips, 4 * workers, 20)  # until every worker is warm
                for clients in (1, 2, 8):
                    m = measured(endpoint.url, clips, clients)
                    print(
                        f"| {kind} | {workers} | {start:.0f} | {mebibytes(endpoint):.0f} | "
                        f"{clients} | {m['rate']:.1f} | {m['rate'] / base:.2f} | "
                        f"{m['p50']:.0f} | {m['p99']:.0f} | {m['lost']} |",
                        flush=True,
                    )


def mebibytes(endpoint: servers.Server) -> float:
    first = psutil.Process(endpoint.process.pid)
    family = [first, *first.children(recursive=True)]
    return sum(process.memory_full_info().pss for process in family) / 2**20


if __name__ == "__main__":
    main()
