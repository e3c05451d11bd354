"""Run the tutorial headless: every cell, in order, with one file of parameters. Or open it.

    python notebooks/run_all.py                         # 01 to 06, without an AWS account
    python notebooks/run_all.py --all                   # and the guides in how_to/, before 06
    python notebooks/run_all.py --open                  # step through them in JupyterLab instead
    python notebooks/run_all.py --only 02               # one notebook, or: --only how_to/deploy
    python notebooks/run_all.py --parameters my.yaml    # your own, for example your AWS account
    python notebooks/run_all.py --language zh-TW        # 01 to 06 in Chinese; before --open too
    python notebooks/run_all.py --refresh-gallery       # and renew the README's pictures
    python notebooks/run_all.py --site FOLDER           # a web site of what --all has executed

Each notebook is executed by papermill with those of the parameters that it has. The first failure
ends the run: it names notebook, cell and error, and the exit code is 1. `--open` makes copies
(local_...) with the parameters in them, and starts JupyterLab; a copy that exists stays as it is.
What follows `--open` goes to JupyterLab: --open --no-browser --port 8889
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import nbformat
import pages
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from PIL import Image

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py: for what a notebook computes
VERSION = ".".join(map(str, sys.version_info[:3]))


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    embedded = HERE / "local_mode" / "parameters.yaml"
    parser.add_argument(
        "--parameters", type=Path, default=embedded, metavar="FILE", help="YAML, as papermill -f"
    )
    parser.add_argument("--all", action="store_true", help="the guides too")
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="such as: 02 03")
    parser.add_argument("--language", choices=["en", "zh-TW"], default="en", help="of 01 to 06")
    parser.add_argument("--refresh-gallery", action="store_true", help="renew notebooks/images")
    parser.add_argument("--site", type=Path, metavar="FOLDER", help="write it, and run nothing")
    parser.add_argument("--output-dir", type=Path, default=HERE / "outputs", metavar="FOLDER")
    parser.add_argument("--open", nargs=argparse.REMAINDER, metavar="OPTION", help="JupyterLab")
    args = parser.parse_args()
    own = {option for action in parser._actions for option in action.option_strings}
    if late := [
        word for word in args.open or [] if word.partition("=")[0] in own - {"-h", "--help"}
    ]:
        parser.error(f"{late[0]} must stand before --open: what follows goes to JupyterLab")
    others = (args.all, args.only, args.refresh_gallery, args.open is not None)
    if args.site and (any(others) or args.language != "en"):
        parser.error("--site runs nothing: it shows what run_all.py --all has executed")
    return args


def name_of(notebook):
    """How a notebook is called here: 01_setup, how_to/deploy, zh-TW/01_setup."""
    return notebook.relative_to(HERE).with_suffix("").as_posix()


def all_notebooks(language="en"):
    """The tutorial with the guides before its last notebook, which deletes what they all made."""
    tutorial = sorted(HERE.glob("0*.ipynb" if language == "en" else f"{language}/0*.ipynb"))
    guides = sorted(path for path in HERE.glob("how_to/*.ipynb") if path.name[:6] != "local_")
    return [*tutorial[:-1], *guides, tutorial[-1]]


def to_open(language):
    """What --open copies: an edition, the guides, and the English tutorial, where they lead."""
    return [*dict.fromkeys([*all_notebooks(language), *all_notebooks()])]


def parameters_of(notebooks, file):
    """{notebook: its parameters}, out of a YAML file. Raises ValueError for a name in none."""
    values = yaml.safe_load(file.read_text()) or {}
    every = {*notebooks, *all_notebooks()}
    known = {path: papermill.inspect_notebook(str(path)) for path in every}
    if unknown := sorted(values.keys() - {name for names in known.values() for name in names}):
        raise ValueError(f"{file}: no notebook has the parameter {', '.join(unknown)}")
    return {nb: {k: v for k, v in values.items() if k in known[nb]} for nb in notebooks}


def local_copies(parameters, file):
    """Copies of the notebooks beside them, with their parameters, whose links lead to each other.

    Returns the first one. A copy that is there already is a reader's own, and stays.
    """
    copies = []
    for notebook, values in parameters.items():
        copy = notebook.with_name(f"local_{notebook.name}")
        copies.append(copy)
        if copy.exists():
            print(f"  kept as it is: {name_of(copy)}")
            continue
        values = {k: v for k, v in values.items() if k != "confirm_delete"}  # a reader confirms
        made = papermill.execute_notebook(
            notebook, None, values, prepare_only=True, progress_bar=False
        )
        for cell in made.cells:
            if cell.cell_type == "markdown":
                cell.source = re.sub(
                    r"\]\(((?:[\w.]+/)*)(\w+\.ipynb)", r"](\1local_\2", cell.source
                )
            elif "injected-parameters" in cell.metadata.get("tags", []):
                why = f"# From {file.name}: these values replace those above."
                cell.source = cell.source.replace("# Parameters", why, 1)
        made.metadata.pop("papermill", None)
        nbformat.write(made, copy)
    return copies[0]


def run(notebook, parameters, output):
    """Executes one notebook; its copy and its page are kept, also when it fails."""
    executed = output / "executed" / f"{name_of(notebook)}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    page = output / "html" / f"{name_of(notebook)}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            notebook,
            executed,
            parameters | {"output_dir": str(output)},
            cwd=notebook.parent,
            progress_bar={"desc": notebook.stem, "disable": None},  # None: on a terminal only
            extra_arguments=["--log-level=ERROR"],
            coalesce_streams=True,  # a progress bar leaves its last line only
        )
    finally:
        about = {"metadata": {"name": notebook.stem, "path": str(notebook.parent)}}
        exporter = HTMLExporter(embed_images=True)  # the page lies elsewhere
        html, _ = exporter.from_notebook_node(nbformat.read(executed, as_version=4), about)
        page.write_text(html, encoding="utf-8")


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


def write_site(output, folder):
    """Writes the web site of what was executed; returns an error's text, or 0."""
    try:
        names = [name_of(path) for path in all_notebooks()]
        pages.make(output, names, folder, os.environ.get("SITE_ADDRESS"))
    except ModuleNotFoundError as error:
        install = f"{sys.executable} -m uv pip install -r tests/requirements.txt"
        return f"--site: {error}. First: {install} --python {sys.executable}"
    except subprocess.CalledProcessError:
        return f"--site: {HERE.parent} is no clone: git must say which files belong to it"
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        return f"--site: {error}"
    print(f"open {os.path.relpath(folder / 'index.html')}")
    return 0


def main():
    if not hasattr(tarfile, "data_filter"):
        return f"Python 3.11.4 or newer is needed, to unpack archives safely; this is {VERSION}"
    args = arguments()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    output = args.output_dir.resolve()
    if args.site:
        return write_site(output, args.site.resolve())
    wanted = all_notebooks(args.language)
    if args.only:
        begins = tuple(name.removeprefix(f"{args.language}/") for name in args.only)
        names = {path: name_of(path).removeprefix(f"{args.language}/") for path in wanted}
        wanted = [path for path in wanted if names[path].startswith(begins)]
    elif args.open is not None:
        wanted = to_open(args.language)
    elif not args.all:
        wanted = [path for path in wanted if path.parent.name != "how_to"]
    if not wanted:
        return f"--only {' '.join(args.only)}: no notebook's name begins like this"
    try:
        parameters = parameters_of(wanted, args.parameters)
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"--parameters: {error}"
    if args.open is not None:
        first = local_copies(parameters, args.parameters)
        print(f"opening {name_of(first)}; delete a copy to have it made anew", flush=True)
        os.chdir(HERE)
        os.execv(
            sys.executable,
            [sys.executable, "-m", "jupyterlab", f"{name_of(first)}.ipynb", *args.open],
        )
    begin = time.monotonic()
    for number, (notebook, values) in enumerate(parameters.items(), 1):
        name = name_of(notebook)
        print(f"[{number}/{len(wanted)}] {name}.ipynb", flush=True)
        start = time.monotonic()
        try:
            run(notebook, values, output)
        except PapermillExecutionError as error:
            cell = failed_cell(output / "executed" / f"{name}.ipynb")
            print(f"FAILED: {name}.ipynb, cell {cell!r}\n  {error.ename}: {error.evalue}")
            print(f"  the page as far as it came: {output / 'html' / name}.html")
            return 1
        except DeadKernelError:
            print(f"FAILED: {name}.ipynb\n  the kernel died, most often for want of memory")
            return 1
        print(f"      {time.monotonic() - start:.0f} s", flush=True)
    if args.refresh_gallery:
        print("\nThe README's pictures, and the preview of links to it:")
        pages.draw_preview(*(output / "pictures" / f"{n}.png" for n in ("timeline", "social")))
        refresh_gallery(output / "pictures", HERE / "images")
    print(f"\nDone in {(time.monotonic() - begin) / 60:.1f} minutes.")
    for what, folder in {
        "executed notebooks": "executed", "the same as HTML": "html",
        "the fine-tuned model": "model", "pictures": "pictures",
    }.items():  # fmt: skip
        if (output / folder).exists():
            print(f"  {what:20} {os.path.relpath(output / folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
