"""Runs the notebooks in order, headless, and says where the results lie.

    python notebooks/run_all.py                         # the embedded default: no AWS account
    python notebooks/run_all.py --only 02               # one notebook
    python notebooks/run_all.py --parameters my.yaml    # your own, for example your AWS account
    python notebooks/run_all.py --refresh-gallery       # and renew the README's pictures

Each notebook is executed by papermill with those of the parameters that it has. The first failure
ends the series: it names notebook, cell and error, and the exit code is 1.
"""

import argparse
import logging
import os
import sys
import tarfile
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from PIL import Image

HERE = Path(__file__).resolve().parent
VERSION = ".".join(map(str, sys.version_info[:3]))


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    embedded = HERE / "local_mode" / "parameters.yaml"
    parser.add_argument(
        "--parameters", type=Path, default=embedded, metavar="FILE", help="YAML, as papermill -f"
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="NN", help="such as: 02 03")
    parser.add_argument("--refresh-gallery", action="store_true", help="renew notebooks/images")
    parser.add_argument("--output-dir", type=Path, default=HERE / "outputs", metavar="FOLDER")
    return parser.parse_args()


def parameters_of(notebooks, file):
    """{notebook: its parameters}, out of a YAML file. Raises ValueError for a name in none."""
    values = yaml.safe_load(file.read_text()) or {}
    known = {notebook: papermill.inspect_notebook(str(notebook)) for notebook in notebooks}
    everywhere = {
        name for path in HERE.glob("0*.ipynb") for name in papermill.inspect_notebook(str(path))
    }
    if unknown := sorted(values.keys() - everywhere):
        raise ValueError(f"{file}: no notebook has the parameter {', '.join(unknown)}")
    return {nb: {k: v for k, v in values.items() if k in names} for nb, names in known.items()}


def run(notebook, parameters, output):
    """Executes one notebook; its copy and its page are kept, also when it fails."""
    executed = output / "executed" / notebook.name
    try:
        papermill.execute_notebook(
            notebook,
            executed,
            parameters | {"output_dir": str(output)},
            cwd=HERE,
            progress_bar={"desc": notebook.stem, "disable": None},  # None: on a terminal only
            extra_arguments=["--log-level=ERROR"],
            coalesce_streams=True,  # a progress bar leaves its last line only
        )
    finally:
        page, _ = HTMLExporter().from_notebook_node(nbformat.read(executed, as_version=4))
        (output / "html" / f"{notebook.stem}.html").write_text(page, encoding="utf-8")


def failed_cell(executed):
    """The id of the cell that raised; it stands in the notebook's source too."""
    cells = nbformat.read(executed, as_version=4).cells
    return next((c.id for c in cells if c.metadata.get("papermill", {}).get("exception")), "?")


def refresh_gallery(pictures, gallery):
    """Renews each PNG of `gallery` from its namesake in `pictures`, in 256 colours: small files.

    Raises FileNotFoundError if the series made no such picture.
    """
    for image in sorted(gallery.glob("*.png")):
        with Image.open(pictures / image.name) as picture:
            small = picture.convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
        small.save(image, optimize=True)
        print(f"  {image.name:20} {image.stat().st_size / 1000:.0f} kB")


def main():
    if not hasattr(tarfile, "data_filter"):
        return f"Python 3.11.4 or newer is needed, to unpack archives safely; this is {VERSION}"
    args = arguments()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    output = args.output_dir.resolve()
    for folder in ("executed", "html"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    notebooks = [p for p in sorted(HERE.glob("0*.ipynb")) if p.name.startswith(tuple(args.only))]
    if not notebooks:
        return f"--only {' '.join(args.only)}: no notebook's name begins like this"
    try:
        parameters = parameters_of(notebooks, args.parameters)
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"--parameters: {error}"
    for number, (notebook, values) in enumerate(parameters.items(), 1):
        print(f"[{number}/{len(notebooks)}] {notebook.name}", flush=True)
        start = time.monotonic()
        try:
            run(notebook, values, output)
        except PapermillExecutionError as error:
            cell = failed_cell(output / "executed" / notebook.name)
            print(f"FAILED: {notebook.name}, cell {cell!r}\n  {error.ename}: {error.evalue}")
            print(f"  the page as far as it came: {output / 'html' / notebook.stem}.html")
            return 1
        except DeadKernelError:
            print(f"FAILED: {notebook.name}\n  the kernel died, most often for want of memory")
            return 1
        print(f"      {time.monotonic() - start:.0f} s", flush=True)
    if args.refresh_gallery:
        print("\nThe README's pictures:")
        refresh_gallery(output / "pictures", HERE / "images")
    print("\nDone.")
    for what, folder in {
        "executed notebooks": "executed", "the same as HTML": "html",
        "the fine-tuned model": "model", "pictures": "pictures",
    }.items():  # fmt: skip
        if (output / folder).exists():
            print(f"  {what:20} {os.path.relpath(output / folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
