"""The report in a real browser, on a phone, on a desktop, in the dark and on paper: `pytest -m browser`.

It needs Debian's chromium (or Chrome) and is run by the gate; without a browser it fails, it is not skipped.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fisherfunc as ff
from fisherfunc.surface.reports.html_report import save_html

pytestmark = pytest.mark.browser
PHONE, DESKTOP = 390, 1280
DARK = "--blink-settings=preferredColorScheme=0"
MEASURE = """<!doctype html><body><iframe id="page" src="report.html" width="{width}" height="900"></iframe><script>
onload = () => {{
  const doc = document.getElementById("page").contentDocument, root = doc.documentElement, look = getComputedStyle;
  const inside = (node) => node.closest(".wide, pre, svg");
  const parts = [...doc.body.querySelectorAll("*")].filter((node) => !inside(node) && node.getClientRects().length);
  const texts = [...doc.body.querySelectorAll("p, td, th, li, h1, h2, h3, pre, figcaption")];
  const colour = (name, node) => look(node)[name].match(/[\\d.]+/g).slice(0, 3).map(Number);
  const found = {{
    page: root.scrollWidth, room: root.clientWidth,
    outside: parts.filter((node) => node.getBoundingClientRect().right > root.clientWidth + 1).map((n) => n.outerHTML),
    smallest: Math.min(...texts.map((node) => parseFloat(look(node).fontSize))),
    plots: [...doc.querySelectorAll("figure svg")].map((node) => node.getBoundingClientRect().width),
    ink: colour("color", doc.body), paper: colour("backgroundColor", doc.body),
    dim: colour("color", doc.querySelector(".dim")),
  }};
  document.body.textContent = "found:" + JSON.stringify(found) + ":end";
}};
</script></body>"""


def browser(*options, cwd):
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    assert path is not None, "no chromium; apt-get install chromium, or leave out `-m browser`"
    own = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    private = [f"--user-data-dir={cwd / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([path, *own, *private, *options], cwd=cwd, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode()


def luminance(colour):
    """Relative luminance, as WCAG 2.2 defines it."""
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page of two results with long names of blocks, and tokens in their context."""
    torch.manual_seed(0)
    layers = {f"a_rather_long_name_of_a_layer_{i}": torch.nn.Linear(5, 5) for i in range(6)}
    model = torch.nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    result = ff.fisher_spectrum(model, (torch.randn(40, 5), torch.randint(5, (40,))), blocks=ff.by_parameter)
    row = {"vector": 0, "share": 0.5, "loss": 1.0, "text": "word", "before": "what came before " * 4, "after": " next"}
    tokens = {"one": {"metadata": {"block": "full matrix"}, "tokens": [row] * 5}}
    place = tmp_path_factory.mktemp("page")
    save_html({"one": result, "two": result}, place / "report.html", tokens=tokens)
    return place


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_can_be_read(folder, width, scheme):
    (folder / "measure.html").write_text(MEASURE.format(width=width), encoding="utf-8")
    options = [DARK] if scheme == "dark" else []
    page = browser("--window-size=1600,1000", "--dump-dom", *options, (folder / "measure.html").as_uri(), cwd=folder)
    found = json.loads(re.search(r"found:(.*):end", page, re.DOTALL)[1].replace("&lt;", "<").replace("&gt;", ">"))
    assert found["page"] <= found["room"] <= width and found["outside"] == []
    assert found["smallest"] >= 12
    assert len(found["plots"]) == 4 and all(300 <= plot <= 480 for plot in found["plots"])
    assert (luminance(found["ink"]) > luminance(found["paper"])) == (scheme == "dark")
    assert contrast(found["ink"], found["paper"]) >= 7 and contrast(found["dim"], found["paper"]) >= 4.5


def test_the_page_is_drawn_and_printed(folder):
    page = (folder / "report.html").as_uri()
    browser(f"--window-size={PHONE},900", "--screenshot=phone.png", page, cwd=folder)
    browser("--print-to-pdf=page.pdf", page, cwd=folder)
    assert (folder / "phone.png").read_bytes().startswith(b"\x89PNG")
    printed = Path(folder / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12  # a result a page
