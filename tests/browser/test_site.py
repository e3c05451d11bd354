"""The web site in a browser: each page, on a laptop and on a phone, in light and dark."""

import pytest
from chromium import LAPTOP, PHONE, PICTURES, marks, started

SITE = PICTURES.with_name("site")
pytestmark = marks
SHOWN = ["index", "notebooks/02_local_smoke_train", "notebooks/zh-TW/README",
         "notebooks/zh-TW/04_results", "notebooks/how_to/train_for_less"]  # fmt: skip
# How wide a page is beyond the window; players without a length; pictures that are broken, or that
# have no text.
FAULTS = """async () => {
    const players = [...document.querySelectorAll('video')];
    for (let waits = 0; waits < 50 && players.some(v => !(v.duration > 0)); waits++)
        await new Promise(done => setTimeout(done, 100));
    const good = i => i.naturalWidth && i.alt && !i.alt.includes('_images/');
    return {
        wide: Math.max(0, document.documentElement.scrollWidth - innerWidth),
        silent: players.filter(v => !(v.duration > 0)).length,
        pictures: [...document.querySelectorAll('article img')].filter(i => !good(i)).length,
    };
}"""


@pytest.mark.parametrize("viewport, scheme", [(LAPTOP, "light"), (PHONE, "dark")])
def test_each_page_is_whole_and_asks_for_nothing_elsewhere(viewport, scheme):
    if not (SITE / "index.html").exists():
        pytest.skip(f"no {SITE}: run_all.py --all, then run_all.py --site notebooks/outputs/site")
    pages = sorted(path for path in SITE.glob("**/*.html") if path.name != "genindex.html")
    assert len(pages) > 25
    asked, errors, faults = [], [], {}
    with started() as browser:
        page = browser.new_page(viewport=viewport, color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for path in pages:
            name = path.relative_to(SITE).with_suffix("").as_posix()
            page.goto(path.as_uri())
            faults[name] = {kind: n for kind, n in page.evaluate(FAULTS).items() if n}
            if name in SHOWN:
                picture = f"site_{name.replace('/', '_')}_{scheme}.png"
                page.screenshot(path=PICTURES / picture, full_page=True)
    assert {name: found for name, found in faults.items() if found} == {} and errors == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
