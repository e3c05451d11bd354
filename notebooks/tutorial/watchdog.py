"""Takes an endpoint down if the notebook that made it dies. endpoint.serving starts it:

    python -m tutorial.watchdog OUTPUT_DIR NAME PID

It ends when run.json lists the endpoint no more. It cannot act while the computer sleeps or is off,
or after your sign-in to AWS has expired: then 06_clean_up.ipynb deletes the endpoint.
"""

import json
import sys
import time
from pathlib import Path

import psutil

LOOK, AGAIN, TRIES = 2, 60, 60  # seconds; seconds; how often, if AWS does not answer


def is_listed(output, name):
    """Whether run.json lists the endpoint."""
    file = Path(output) / "run.json"
    return file.exists() and f"endpoint/{name}" in json.loads(file.read_text()).get("deployed", [])


def is_alive(pid, started):
    """Whether the process runs that had this number before."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def main(output, name, pid):
    """Waits for the end of the process or of the endpoint; then takes down what is left."""
    started = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else None
    while is_listed(output, name) and is_alive(pid, started):
        time.sleep(LOOK)
    for _ in range(TRIES):
        if not is_listed(output, name):
            return
        print(f"{time.ctime()}: the process {pid} is gone, but {name} is not", flush=True)
        try:
            take_down(output, name)
        except Exception as error:
            print(error, flush=True)
            time.sleep(AGAIN)


def take_down(output, name):
    """As the notebook would have done it."""
    import boto3  # here: they take memory that a healthy notebook needs

    from tutorial import account, endpoint

    here = account.read_run(output)
    here.session = boto3.Session(region_name=here.run["region"])
    endpoint.take_down(here, name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
