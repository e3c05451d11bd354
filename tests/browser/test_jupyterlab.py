"""The tutorial in JupyterLab, as a reader sees it in a browser: pytest -m browser.

The notebooks run in a copy of the repository, by the README's first way. The tests keep their
order: each goes on with what the one before has left.
"""

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from chromium import LAPTOP, PICTURES, marks, started, sync_api
from conftest import ROOT
from embedded import free_port

TOKEN = secrets.token_hex()
PYTHON = os.environ.get("READER_PYTHON", sys.executable)  # one with requirements.txt and no more
pytestmark = marks


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of what git tracks, in a folder with a space, with an embedded AWS of its own."""
    folder = tmp_path_factory.mktemp("a reader") / "tutorial"
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    parameters = folder / "notebooks" / "local_mode" / "parameters.yaml"
    port = free_port()
    parameters.write_text(parameters.read_text().replace(":5599", f":{port}"))
    yield folder
    from local_mode import aws

    aws.stop(port)


@pytest.fixture(scope="module")
def browser():
    with started() as browser:
        yield browser


def outputs_of(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def errors(outputs):
    return [f"{out.ename}: {out.evalue}" for out in outputs if out.output_type == "error"]


class Lab:
    """JupyterLab as the README's first line starts it, and a page of the browser that shows it."""

    def __init__(self, repository, browser, *options):
        self.folder, self.page = repository / "notebooks", browser.new_page(viewport=LAPTOP)
        port = free_port()
        self.log = repository / f"lab_{port}.log"
        self.address = f"http://127.0.0.1:{port}/lab/tree"
        run_all = [PYTHON, "notebooks/run_all.py", *options, "--open", "--no-browser"]
        run_all += ["--allow-root", f"--port={port}", f"--IdentityProvider.token={TOKEN}"]
        environ = os.environ | {"JUPYTER_CONFIG_DIR": str(repository / "jupyter")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                run_all, cwd=repository, env=environ, stdout=log, stderr=log
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()  # kernels; JupyterLab can wait for one for ever
        self.process.kill()
        self.process.wait()

    def open(self, name):
        """Opens a notebook, as soon as JupyterLab answers, and waits for its kernel."""
        limit = time.monotonic() + 120
        while " is running at:" not in self.log.read_text():
            assert time.monotonic() < limit and self.process.poll() is None, self.log.read_text()
            time.sleep(0.3)
        self.page.goto(f"{self.address}/{name}.ipynb?token={TOKEN}&reset")
        self.status("idle").wait_for(timeout=120_000)
        news = self.page.get_by_role("button", name="No", exact=True)  # of Jupyter's, if it asks
        if news.is_visible():
            news.click()

    def status(self, which):
        return self.page.locator(f".jp-Notebook-ExecutionIndicator[data-status={which}]").first

    def saved(self, name, done, minutes=1):
        """The notebook on the disk, saved by the reader's keys until `done` is true of it."""
        limit = time.monotonic() + 60 * minutes
        while time.monotonic() < limit:
            self.page.keyboard.press("Control+s")
            self.page.wait_for_timeout(1500)
            with contextlib.suppress(ValueError):  # it is being written
                notebook = nbformat.read(self.folder / f"{name}.ipynb", as_version=4)
                if done(notebook):
                    return notebook
        raise AssertionError(f"{name} did not come so far in {minutes} minutes")

    def run_all(self, name):
        """*Run All Cells* of the menu; returns the outputs after the last cell."""
        numbered = self.page.locator(".jp-InputArea-prompt", has_text=re.compile(r"\[(\*|\d+)\]"))
        for _ in range(3):  # while a notebook is still being set up, JupyterLab may ignore the menu
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.get_by_text("Run All Cells", exact=True).click()
            with contextlib.suppress(sync_api.TimeoutError):
                numbered.first.wait_for(timeout=20_000)
                break

        def ended(notebook):
            code = [cell for cell in notebook.cells if cell.cell_type == "code"]
            return errors(outputs_of(notebook)) or all(cell.execution_count for cell in code)

        outputs = outputs_of(self.saved(name, ended, minutes=15))
        assert errors(outputs) == []
        self.status("idle").wait_for(timeout=60_000)
        return outputs

    def look(self, name):
        """Scrolls through the notebook; {kind: what is wrong}; keeps a picture of each screen."""
        found = {"scrolled": 0, "wide": 0, "silent": 0, "broken": 0}
        panel = self.page.locator(".jp-WindowedPanel-outer").first
        panel.evaluate("panel => panel.scrollTo(0, 0)")
        for number in range(100):
            self.page.wait_for_timeout(700)
            for kind, count in self.page.evaluate(FAULTS).items():
                found[kind] += count
            self.page.screenshot(path=PICTURES / f"{name.replace('/', '_')}_{number:02}.png")
            if panel.evaluate(DOWN):
                return {kind: count for kind, count in found.items() if count}
        raise AssertionError(f"{name} has more than 100 screens")


DOWN = """panel => {  // and whether it was at its end
    const end = panel.scrollTop + panel.clientHeight >= panel.scrollHeight - 1;
    panel.scrollTo(0, panel.scrollTop + 0.9 * panel.clientHeight);
    return end;
}"""
# Figures and players must show whole, and a player must know how long its video is.
FAULTS = """async () => {
    const all = what => [...document.querySelectorAll(what)];
    const scrolls = e => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1;
    const figures = all('.jp-OutputArea-output').filter(e => e.querySelector('img, video'));
    const players = all('.jp-OutputArea-output video');
    for (let waits = 0; waits < 50 && players.some(v => !(v.duration > 0)); waits++)
        await new Promise(done => setTimeout(done, 100));
    return {
        scrolled: all('.jp-mod-outputsScrolled').length,
        wide: figures.filter(scrolls).length,
        silent: players.filter(v => !(v.duration > 0)).length,
        broken: all('.jp-Notebook img').filter(i => i.complete && !i.naturalWidth).length,
    };
}"""


@pytest.fixture(scope="module")
def lab(repository, browser):
    with Lab(repository, browser) as lab:
        yield lab


@pytest.mark.parametrize(
    "name, pictures, players",
    [
        ("local_01_setup", 0, 0),
        ("local_02_local_smoke_train", 7, 0),
        ("local_03_remote_launch", 0, 0),
        ("local_04_results", 4, 1),
    ],
)
def test_every_cell_runs_and_every_figure_shows_whole(lab, name, pictures, players):
    lab.open(name)
    data = [out.get("data", {}) for out in lab.run_all(name)]
    assert sum("image/png" in one for one in data) == pictures
    assert sum("<video" in one.get("text/html", "") for one in data) == players
    assert lab.look(name) == {}


@pytest.mark.parametrize("number", ["01", "02", "03", "04"])
def test_the_next_link_opens_the_next_copy(lab, number):
    (name,) = (path.stem for path in lab.folder.glob(f"local_{number}*.ipynb"))
    lab.open(name)
    last = nbformat.read(lab.folder / f"{name}.ipynb", as_version=4).cells[-1].source
    following = re.search(r"Next.*?\]\((\w+\.ipynb)\)", last)[1]
    panel = lab.page.locator(".jp-WindowedPanel-outer").first
    link = lab.page.locator(f".jp-Notebook a[href*='{following}']").last
    for _ in range(100):  # screens; what is not on the screen may not be there
        if panel.evaluate(DOWN) and link.is_visible():
            break
        lab.page.wait_for_timeout(300)
    link.click()
    tab = lab.page.locator("#jp-main-dock-panel .lm-TabBar-tab.lm-mod-current")
    sync_api.expect(tab).to_contain_text(following)


def test_the_labeller_plays_a_piece_and_a_press_writes_a_row(lab):
    name = "how_to/local_bring_your_own_clips"
    lab.open(name)
    lab.run_all(name)
    assert lab.look(name) == {}
    button = lab.page.get_by_role("button", name="raising_hand", exact=True)
    panel = lab.page.locator(".jp-WindowedPanel-outer").first
    panel.evaluate("panel => panel.scrollTo(0, 0)")
    while not button.is_visible() and not panel.evaluate(DOWN):
        lab.page.wait_for_timeout(700)
    button.scroll_into_view_if_needed()
    video = lab.page.locator(".jupyter-widgets video").first
    sync_api.expect(video).to_have_js_property("paused", False)  # it plays by itself
    assert video.evaluate("video => video.duration") == pytest.approx(4, abs=1)
    button.click()
    sync_api.expect(lab.page.get_by_text(re.compile("^2 of "))).to_be_visible()
    lab.page.screenshot(path=PICTURES / "labeller.png")
    table = lab.folder / "outputs" / "own_labels.csv"
    assert table.read_text().count(",raising_hand\n") == 1


def test_a_second_opening_keeps_edits(lab, repository, browser):
    name, mine = "local_02_local_smoke_train", "# my own line"
    lab.open(name)
    cell = lab.page.locator(".jp-CodeCell .cm-content").first  # the parameters
    cell.click()
    lab.page.keyboard.press("Control+End")
    lab.page.keyboard.type(f"\n{mine}")
    lab.saved(name, lambda notebook: mine in notebook.cells[1].source)
    with Lab(repository, browser) as again:
        again.open(name)
        sync_api.expect(again.page.locator(".jp-CodeCell .cm-content").first).to_contain_text(mine)
        assert f"kept as it is: {name}" in again.log.read_text()


def test_the_page_for_colleagues_takes_a_video_and_shows_when(repository, lab, browser):
    from tutorial import hand_on

    parameters = repository / "page.yaml"  # the guide, without what AWS would bill
    text = (lab.folder / "local_mode" / "parameters.yaml").read_text()
    parameters.write_text(re.sub(r"(?m)^(deploy|transform): true", r"\1: false", text))
    run_all = [PYTHON, lab.folder / "run_all.py", "--only", "how_to/deploy"]
    subprocess.run([*run_all, "--parameters", parameters], check=True, timeout=600)
    outputs = lab.folder / "outputs"
    video = next((outputs / "clips" / "test" / "raising_hand").glob("*.mp4"))
    with hand_on.running_page(outputs / "hand_on" / "colleagues_page.py") as address:
        page = browser.new_page(viewport=LAPTOP)
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(video)
        page.locator("video").wait_for(timeout=60_000)
        page.get_by_role("button", name="Submit").click()
        page.locator("img[src*='/file=']").wait_for(timeout=120_000)
        page.wait_for_timeout(1000)
        page.screenshot(path=PICTURES / "colleagues.png", full_page=True)
        assert page.locator("video").evaluate("v => v.duration") > 1
        page.close()
