"""A web site of the executed notebooks: run_all.py --site FOLDER.

Sphinx writes it, with MyST-NB, which reads notebooks, and the theme Furo: light and dark, readable
on a phone, nothing loaded from elsewhere. Files keep their folders, so links between them hold.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
TITLE = "Fine-tune VideoMAE-v2"
CHINESE = "notebooks/zh-TW"
COPIED = [
    "README.md", "LICENSE", "notebooks/*.md", "notebooks/images/*", "notebooks/aws/*.*",
    "notebooks/how_to/*.md", "notebooks/local_mode/**/*.*", "notebooks/zh-TW/*.md",
    "scripts/**/*.*", "tests/**/*.py", "tests/**/*.md",
]  # fmt: skip
SIDEBAR = {
    "Tutorial": ["notebooks/0*"],
    "繁體中文": [f"簡介 <{CHINESE}/README>", f"{CHINESE}/0*", f"{CHINESE}/troubleshooting"],
    "Guides": ["notebooks/how_to/README", "notebooks/how_to/*"],
    "Reference": [
        "notebooks/troubleshooting", "notebooks/aws/*", "notebooks/local_mode/**",
        "tests/benchmarks/*",
    ],
}  # fmt: skip


def without_paths(notebook, output):
    """A copy that does not say where the notebook was executed, without the state of widgets."""
    text = nbformat.writes(notebook).replace(str(output), "outputs").replace(str(ROOT), "..")
    made = nbformat.reads(text, as_version=4)
    made.metadata.pop("widgets", None)
    for cell in made.cells:
        for out in cell.get("outputs", []):
            out.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return made


def translated(executed, edition):
    """An executed notebook with the prose and alt texts of an edition with the same cell ids."""
    made, by_id = nbformat.from_dict(executed), {cell.id: cell for cell in edition.cells}
    for cell in made.cells:
        if cell.id in by_id:
            cell.source, cell.metadata = by_id[cell.id].source, by_id[cell.id].metadata
    return made


def without_alt_text(notebook):
    """The ids of cells that show a picture, and have no `mystnb: image: alt` in their metadata."""
    return [
        cell.id
        for cell in notebook.cells
        if any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))
        and not cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
    ]


def collect(output, names, source):
    """Copies the repository's texts, and the executed notebooks, into the folder `source`."""
    for path in {path for pattern in COPIED for path in ROOT.glob(pattern) if path.is_file()}:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name in names:
        executed = nbformat.read(output / "executed" / f"{name}.ipynb", as_version=4)
        notebook = without_paths(executed, output)
        if silent := without_alt_text(notebook):
            raise ValueError(f"{name}: pictures without an alt text: {', '.join(silent)}")
        nbformat.write(notebook, source / "notebooks" / f"{name}.ipynb")
        edition = ROOT / CHINESE / f"{name}.ipynb"
        if edition.exists():
            made = translated(notebook, nbformat.read(edition, as_version=4))
            nbformat.write(made, source / CHINESE / f"{name}.ipynb")
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
    """What a page's head says beside its title: its language, and the picture of its preview."""

    def add(app, name, template, context, doctree):
        context["language"] = "zh-TW" if name.startswith(CHINESE) else "en"
        if address:
            picture = f"{address.rstrip('/')}/_static/social.png"
            tag = f'<meta property="og:image" content="{picture}">'
            context["metatags"] = context.get("metatags", "") + tag

    return add


def make(output, names, folder, address=None):
    """Writes the site into `folder` from output/executed, where the notebooks `names` must lie.

    address: where the site will be, for its preview picture. Raises FileNotFoundError with the
    notebooks that were not executed, ModuleNotFoundError without Sphinx, ValueError with the cells
    whose picture has no alt text, RuntimeError if Sphinx warns, for example of a broken link.
    """
    missing = [n for n in names if not (output / "executed" / f"{n}.ipynb").exists()]
    if missing:
        raise FileNotFoundError(f"not executed yet: {', '.join(missing)}. First: run_all.py --all")
    from sphinx.application import Sphinx  # of tests/requirements.txt

    with tempfile.TemporaryDirectory() as place:
        source, tree = Path(place, "source"), Path(place, "tree")
        collect(output, names, source)
        settings = {
            "project": TITLE, "html_title": TITLE, "extensions": ["myst_nb"], "html_theme": "furo",
            "nb_execution_mode": "off", "nb_merge_streams": True, "myst_heading_anchors": 4,
            "html_show_sphinx": False, "html_copy_source": False, "html_show_copyright": False,
            "html_static_path": ["notebooks/images"],
        }  # fmt: skip
        with open(os.devnull, "w") as nowhere, open(Path(place, "log"), "w+") as log:
            app = Sphinx(source, None, folder, tree, "html", settings, nowhere, log)
            app.connect("html-page-context", add_facts(address))
            app.build()
            log.seek(0)
            faults = log.read()
    if faults:
        raise RuntimeError(f"the site in {folder} has faults:\n{faults}")


def draw_preview(timeline, file):
    """The picture of 1280 x 640 pixels that a link to the repository shows: title and timeline."""
    figure = Figure(figsize=(12.8, 6.4), dpi=100)
    title = "Fine-tune VideoMAE-v2 on your own video clips"
    figure.text(0.5, 0.9, title, fontsize=32, weight="bold", ha="center", va="center")
    below = "on your laptop, then on Amazon SageMaker: every cell runs"
    figure.text(0.5, 0.79, below, fontsize=25, color="0.3", ha="center", va="center")
    axes = figure.add_axes((0.06, 0.03, 0.88, 0.68))
    axes.imshow(plt.imread(timeline), aspect="equal", interpolation="lanczos")
    axes.axis("off")
    figure.savefig(file)
