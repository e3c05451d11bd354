"""A web site of the executed notebooks: run_all.py --site FOLDER.

Sphinx writes it, with MyST-NB, which reads notebooks, and the theme Furo: light and dark, readable
on a phone, nothing loaded from elsewhere. Files keep their folders, so links between them hold.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
TITLE = "Fine-tune VideoMAE-v2"
CHINESE = "notebooks/zh-TW"
SIDEBAR = {
    "Tutorial": ["notebooks/0*"],
    "繁體中文": [f"簡介 <{CHINESE}/README>", f"{CHINESE}/0*", f"{CHINESE}/troubleshooting"],
    "Guides": ["notebooks/how_to/README", "notebooks/how_to/*"],
    "Reference": [
        "notebooks/troubleshooting", "notebooks/aws/*", "notebooks/local_mode/**",
        "tests/benchmarks/*",
    ],
}  # fmt: skip
# Tables of pandas: thin lines; a wide one scrolls by itself on a phone.
STYLE = """
.cell_output .output { overflow-x: auto }
.cell_output table.dataframe { border: 0; border-collapse: collapse; font-size: 0.85em }
.cell_output .dataframe :is(th, td) {
  border: 0; border-bottom: 1px solid var(--color-table-border); padding: 0.3em 0.6em }
"""
TEXTS = ["text/plain", "text/html", "text/markdown"]


def private(output):
    """{pattern: what a page says instead}: this computer's folders, and an account's number."""
    embedded = re.escape(str(Path(tempfile.gettempdir(), "embedded-aws"))) + r"[\w-]*"
    return {
        re.escape(str(output)): "outputs",
        re.escape(str(ROOT)): "..",
        embedded: "embedded-aws",
        r'(?<=[:"])\d{12}(?=[:"])': "123456789012",
    }


def cleaned(notebook, output):
    """A copy without what is private, and without the state of widgets."""
    made = nbformat.from_dict(notebook)
    made.metadata.pop("widgets", None)

    def clean(text):
        for pattern, instead in private(output).items():
            text = re.sub(pattern, instead, text)
        return text

    for cell in made.cells:
        cell.source = clean(cell.source)
        for out in cell.get("outputs", []):
            if "text" in out:
                out.text = clean(out.text)
            data = out.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)
            data |= {kind: clean(text) for kind, text in data.items() if kind in TEXTS}
    return made


def faults(notebook):
    """What must not be shown: cells that failed, and pictures without an alt text."""
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            if out.output_type == "error":
                yield f"cell {cell.id} failed with {out.ename}"
            silent = not cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
            if "image/png" in out.get("data", {}) and silent:
                yield f"cell {cell.id} shows a picture, and its metadata have no mystnb: image: alt"


def translated(executed, edition):
    """An executed notebook with the prose and alt texts of an edition with the same cell ids."""
    made, by_id = nbformat.from_dict(executed), {cell.id: cell for cell in edition.cells}
    for cell in made.cells:
        if cell.id in by_id:
            cell.source, cell.metadata = by_id[cell.id].source, by_id[cell.id].metadata
    return made


def collect(output, names, source):
    """Copies what git tracks, and the executed notebooks, into the folder `source`.

    Raises ValueError with each notebook that failed or has a picture without an alt text,
    CalledProcessError outside a clone.
    """
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, tracked.split("\0")):
        if not name.startswith(".") and not name.endswith(".ipynb"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    found = []
    for name in names:
        executed = nbformat.read(output / "executed" / f"{name}.ipynb", as_version=4)
        found += [f"{name}: {fault}" for fault in faults(executed)]
        notebook = cleaned(executed, output)
        nbformat.write(notebook, source / "notebooks" / f"{name}.ipynb")
        edition = ROOT / CHINESE / f"{name}.ipynb"
        if edition.exists():
            made = translated(notebook, nbformat.read(edition, as_version=4))
            nbformat.write(made, source / CHINESE / f"{name}.ipynb")
    if found:
        raise ValueError("\n".join(found))
    first = (source / "README.md").rename(source / "index.md")
    for page in [*source.rglob("*.md"), *source.rglob("*.ipynb")]:
        up = "../" * (len(page.relative_to(source).parts) - 1)
        text = re.sub(r"\((\.\./)+deployments/github-pages\)", f"({up}index.md)", page.read_text())
        page.write_text(text.replace(f"({up}README.md)", f"({up}index.md)") if up else text)
    for caption, pages in SIDEBAR.items():
        lines = [":hidden:", ":glob:", f":caption: {caption}", *pages]
        with first.open("a") as file:
            print("\n```{toctree}", *lines, "```", sep="\n", file=file)


def add_facts(address):
    """What a page's head says beside its title: language, wide tables, the preview's picture."""

    def add(app, name, template, context, doctree):
        context["language"] = "zh-TW" if name.startswith(CHINESE) else "en"
        tags = f"<style>{STYLE}</style>"
        if address:
            picture = f"{address.rstrip('/')}/_static/social.png"
            tags += f'<meta property="og:image" content="{picture}">'
        context["metatags"] = context.get("metatags", "") + tags

    return add


def make(output, names, folder, address=None):
    """Writes the site into `folder` from output/executed, where the notebooks `names` must lie.

    address: where the site will be, for its preview picture. Raises FileNotFoundError with the
    notebooks that were not executed, ModuleNotFoundError without Sphinx, ValueError as collect
    does, RuntimeError if Sphinx warns, for example of a broken link: `folder` is as it was then.
    """
    missing = [n for n in names if not (output / "executed" / f"{n}.ipynb").exists()]
    if missing:
        raise FileNotFoundError(f"not executed yet: {', '.join(missing)}. First: run_all.py --all")
    import furo  # noqa: F401 (these three are in tests/requirements.txt)
    import myst_nb  # noqa: F401
    from sphinx.application import Sphinx

    with tempfile.TemporaryDirectory() as place:
        source, made = Path(place, "source"), Path(place, "made", "site")
        collect(output, names, source)
        settings = {
            "project": TITLE, "html_title": TITLE, "extensions": ["myst_nb"], "html_theme": "furo",
            "nb_execution_mode": "off", "nb_merge_streams": True, "myst_heading_anchors": 4,
            "nb_render_markdown_format": "myst",  # which knows tables
            "html_show_sphinx": False, "html_copy_source": False, "html_show_copyright": False,
            "html_static_path": ["notebooks/images"],
        }  # fmt: skip
        with open(os.devnull, "w") as nowhere, open(Path(place, "log"), "w+") as log:
            app = Sphinx(source, None, made, Path(place, "tree"), "html", settings, nowhere, log)
            app.connect("html-page-context", add_facts(address))
            app.build()
            log.seek(0)
            warnings = re.sub(r"\x1b\[[\d;]*m", "", log.read()).replace(str(source), "")
        if warnings:
            raise RuntimeError(f"Sphinx warns:\n{warnings}")
        shutil.copytree(made, folder, dirs_exist_ok=True)


def draw_preview(timeline, file):
    """The picture of 1280 x 640 pixels that a link to the repository shows: title and timeline.

    Raises FileNotFoundError without the picture `timeline`, which notebook 4 makes.
    """
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 6.4), dpi=100)
    title = "Fine-tune VideoMAE-v2 on your own video clips"
    figure.text(0.5, 0.9, title, fontsize=32, weight="bold", ha="center", va="center")
    below = "on your laptop, then on Amazon SageMaker: every cell runs"
    figure.text(0.5, 0.79, below, fontsize=25, color="0.3", ha="center", va="center")
    axes = figure.add_axes((0.06, 0.03, 0.88, 0.68))
    axes.imshow(plt.imread(timeline), aspect="equal", interpolation="lanczos")
    axes.axis("off")
    figure.savefig(file)
