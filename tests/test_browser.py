"""The report's script in a real browser, where there is one."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import write_folder

from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.report import Scored, write_report
from ietagc_diffusers.eval.score import Protocol, Tools, score

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two models, 60 images each: copies and fresh ones."""
    folder = tmp_path_factory.mktemp("browser")
    training = write_folder(folder / "training", 60)
    scored = []
    for number, name in enumerate(("copying", "fresh")):
        images = load_images(training if number == 0 else write_folder(folder / name, 60, seed=5), "x")
        images.rows = [row | {"seed": seed} for seed, row in enumerate(images.rows)]
        tools = Tools(Protocol(descriptor="pixel", patches=name == "fresh"))
        score(images, load_images(training, "x"), folder / f"scores-{name}", tools)
        scored.append(Scored.load(folder / f"scores-{name}", name))
    return write_report(scored, folder / "report.html")


def dom(page, tmp_path, script=""):
    """The page's elements after its script and another one ran."""
    changed = tmp_path / "page.html"
    watch = "<script>window.onerror = message => document.title = 'ERROR ' + message;</script>"
    text = page.read_text().replace("<title>", watch + "<title>", 1)
    changed.write_text(text.replace("</html>", f"<script>{script}</script></html>"))
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{changed}"], capture_output=True, text=True, timeout=120)
    assert "<title>ERROR" not in done.stdout and "</html>" in done.stdout, done.stdout[:500] + done.stderr[-500:]
    return done.stdout


def cards(text):
    return re.findall(r'class="(pair(?: copy)?)"', text)


def choose(element, value):
    return f"document.getElementById('{element}').value = '{value}';"


CHANGED = "document.getElementById('model').dispatchEvent(new Event('input'));"


def test_the_most_similar_pairs_are_shown_first_and_more_on_demand(report, tmp_path):
    text = dom(report, tmp_path)
    assert cards(text) == ["pair copy"] * 48
    assert not re.search(r'id="more"[^>]*hidden', text) and "120 of 120 generated images" in text
    more = "document.getElementById('more').click(); document.getElementById('more').click();"
    assert len(cards(dom(report, tmp_path, more))) == 120
    assert len(re.findall(r'class="strip"', text)) == 24


def test_crops_are_shown_where_they_were_compared(report, tmp_path):
    text = dom(report, tmp_path, choose("model", 1) + choose("sort", "patch_similarity down") + CHANGED)
    assert text.count('class="two crops') == 48 and "most similar crops; training image: 0" in text


def test_many_models_side_by_side_do_not_widen_a_phone_s_page(report, tmp_path):
    wide = tmp_path / "wide.html"
    start, data, end = re.split(r'(?s)(?<=id="data">)(.*?)(?=</script>)', report.read_text(), maxsplit=1)
    values = json.loads(data)
    for row in values["compare"]:
        row["cells"] *= 4
    wide.write_text(start + json.dumps(values).replace("<", "\\u003c") + end)
    script = "document.body.style.width = '360px'; document.title = 'width ' + document.body.scrollWidth;"
    assert "<title>width 360</title>" in dom(wide, tmp_path, script)


def test_pairs_are_filtered_and_sorted(report, tmp_path):
    fresh = dom(report, tmp_path, choose("model", 1) + CHANGED)
    assert cards(fresh) == ["pair"] * 48
    assert "60 of 120 generated images" in dom(report, tmp_path, choose("copies", 1) + CHANGED)
    found = dom(report, tmp_path, choose("search", "007_0.png") + CHANGED)
    assert 1 <= len(cards(found)) < 10 and "007_0.png" in found
    lowest = dom(report, tmp_path, choose("sort", "similarity up") + CHANGED)
    shown = [float(value) for value in re.findall(r"similarity (-?\d\.\d+)</b>", lowest)]
    assert shown == sorted(shown) and shown[0] < 0.5
    assert cards(dom(report, tmp_path, choose("least", 0.99) + CHANGED)) == ["pair copy"] * 48
