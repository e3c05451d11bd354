"""The command line of the embedded AWS, and the server's own process (`serve`).

    python notebooks/local_mode/aws start        # and: status, stop, interrupt JOB

It works from any folder: Python runs the __main__.py of a folder.
"""

import argparse
import json
import sys
from pathlib import Path

# Python has put this folder first on the path; its modules are local_mode.aws.jobs and so on.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from local_mode import aws  # noqa: E402
from local_mode.aws.server import Server  # noqa: E402


def main():
    """The command line. Returns the exit code, or an error message."""
    parser = argparse.ArgumentParser(description="The embedded AWS: moto, whose training jobs run.")
    parser.add_argument("action", choices=["start", "status", "stop", "interrupt", "serve"])
    parser.add_argument("job", nargs="?", help="the spot job to interrupt")
    parser.add_argument("--port", type=int, default=aws.PORT)
    parser.add_argument(
        "--grace", type=float, default=aws.GRACE_SECONDS, help="SIGTERM to SIGKILL, s"
    )
    parser.add_argument("--spot-interruptions", type=int, default=1, help="of each spot job")
    parser.add_argument("--enforce", action="store_true", help="IAM policies count")
    parser.add_argument(
        "--no-capacity", action="append", default=[], help="an instance type that is not to be had"
    )
    parser.add_argument("--no-namespaces", action="store_true", help="jobs without PID namespaces")
    options = parser.parse_args()
    nothing = f"No embedded AWS runs on port {options.port}."
    world = options.grace, options.spot_interruptions, options.enforce
    world += options.no_capacity, not options.no_namespaces
    try:
        if options.action == "serve":  # in the foreground; `start` puts this in the background
            Server(options.port, *world).serve()
        elif options.action == "start":
            url = aws.start(options.port, *world)
            print(f"The embedded AWS answers at {url}")
        elif options.action == "stop":
            print("Stopped." if aws.stop(options.port) else nothing)
        elif options.action == "interrupt":
            aws.interrupt(options.job, options.port)
        else:
            running = aws.status(options.port)
            print(json.dumps(running, indent=2) if running else nothing)
            return 0 if running else 1
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
