"""An image that runs train.py, out of the files of this machine: nothing is downloaded.

    python tests/how_to/container/image.py NAME

It holds the Python that runs this, torch (as AWS's training images do), the packages of
scripts/requirements.txt, all as they are installed here, the system libraries that those link, bash
and a few tools. So the `pip install -r requirements.txt` of SageMaker's start script finds
everything there, and the container needs no network.
"""

import io
import re
import subprocess
import sys
import sysconfig
import tarfile
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).resolve().parents[3] / "scripts" / "requirements.txt"
LIBRARY = f"usr/local/lib/python{sysconfig.get_python_version()}"  # where the image has Python's
SETTINGS = [
    "ENV PATH=/usr/local/bin:/usr/bin:/bin",
    "ENV LD_LIBRARY_PATH=/usr/local/lib",
    f"ENV PYTHONPATH=/{LIBRARY}/site-packages",  # Debian's own Python would not look there
]
TOOLS = ["bash", "sh", "cat", "chmod", "ls", "mkdir", "rm", "sleep"]
WRITTEN = {
    "usr/local/bin/pip3": b'#!/bin/sh\nexec python3 -m pip "$@"\n',
    "etc/passwd": b"root:x:0:0:root:/root:/bin/bash\n",
}
LEFT_OUT = {"site-packages", "dist-packages", "include", "test", "tests", "ensurepip", "idlelib"}


def package_paths(requirements: list[str]) -> set[Path]:
    """Files and folders of installed packages, and of what they require in turn.

    Raises importlib.metadata.PackageNotFoundError for one that is not installed.
    """
    paths, seen, queue = set(), set(), [(Requirement(line), {""}) for line in requirements]
    while queue:
        need, asked = queue.pop()  # asked: the extras of the package that requires it
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in asked):
            continue
        if (key := (need.name.lower(), *sorted(need.extras))) in seen:
            continue
        seen.add(key)
        package = distribution(need.name)
        tops = {file.parts[0] for file in package.files} - {".."}  # .. are commands in bin/
        paths |= {Path(package.locate_file(top)) for top in tops}
        queue += [(Requirement(line), need.extras or {""}) for line in package.requires or []]
    return {path for path in paths if path.exists()}


def linked_libraries(files: list[Path]) -> set[Path]:
    """The shared libraries that the programs and libraries in `files` load, as absolute paths."""
    report = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True).stdout
    return {Path(name) for name in re.findall(r"\s(/\S+) \(0x", report)}


def image_files() -> dict[Path, str]:
    """{file or folder of this machine: where it lies in the image}."""
    lines = REQUIREMENTS.read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    packages = package_paths(["pip", "torch", *wanted])
    python, standard = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    tools = [path for tool in TOOLS if (path := Path("/bin", tool)).exists()]
    files = {path: f"{LIBRARY}/site-packages/{path.name}" for path in packages}
    files |= {path: f"bin/{path.name}" for path in tools}
    files |= {standard: LIBRARY, python: "usr/local/bin/python3"}

    binaries = [path for top in packages for path in top.rglob("*.so*")]
    binaries += [*tools, python, *standard.glob("lib-dynload/*.so")]
    for path in linked_libraries(binaries):
        if path.name.startswith("libpython"):
            files[path] = f"usr/local/lib/{path.name}"
        elif not any(path.resolve().is_relative_to(top.resolve()) for top in packages):
            files[path] = str(path).lstrip("/")
    return files


def part_of_image(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """`entry` as root's, or None if it is left out."""
    entry.uid = entry.gid = 0
    name = Path(entry.name).name
    return None if name in LEFT_OUT or name.endswith(".a") else entry


def write_archive(file) -> None:
    """Writes the image's file system to `file`, a binary stream, as a tar archive."""
    with tarfile.open(fileobj=file, mode="w|", dereference=True, bufsize=1 << 20) as archive:
        for path, name in image_files().items():
            archive.add(path, name, filter=part_of_image)
        for name, text in WRITTEN.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o755
            archive.addfile(entry, io.BytesIO(text))
        entry = tarfile.TarInfo("tmp")
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777
        archive.addfile(entry)


def build(name: str) -> None:
    """Makes the image `name` in the Docker engine. Raises subprocess.CalledProcessError."""
    changes = [part for setting in SETTINGS for part in ("--change", setting)]
    command = ["docker", "import", *changes, "-", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        with process.stdin as pipe:
            write_archive(pipe)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


if __name__ == "__main__":
    build(sys.argv[1])
