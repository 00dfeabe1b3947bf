"""The report, clicked through in a real browser: offline, quick, on a screen, a phone and paper."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser import Browser, browser
from tests.study.test_tables import made

from bitbook import Codebook, Plan, Uniform, compress
from bitbook.models import build_model
from bitbook.study.grid import mnist_recipes
from bitbook.study.report import write_report
from bitbook.study.sketch import sketch
from bitbook.study.tables import points, repeat_command

MODEL = "mlp-64-32-16-10"
TOO_LONG = 2.0  # seconds


def sketched(plan: Plan) -> list[dict[str, Any]]:
    model = build_model(MODEL, seed=0)
    start = {name: w.detach() for name, w in model.named_parameters()}
    return sketch(start, compress(model, plan), (1, 8, 8))


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """Scalars that an entropy coder shrinks below vectors, which are on the front at fixed width only."""
    sizes = {"scalar": [1000, 2000, 3000], "rows": [900, 1800, 2700]}
    found = [
        made(method, f"{i} bits", sizes[method][i], right + seed, family=family, seed=seed, tune=tune)
        for method, family in (("scalar", "scalar"), ("rows", "vector"))
        for i, right in enumerate((30, 36, 42))
        for seed in (0, 1, 2)
        for tune in ({"epochs": 5, "lr": 0.01, "batch": 64}, None)
    ]
    found += [made("float", "float32", 9000, 47 + seed, family="float", seed=seed) for seed in (0, 1)]
    drawn = {
        "scalar": sketched(Plan({"fc*.weight": Uniform(3)})),
        "rows": sketched(Plan({"fc1.weight": Codebook(4, (1, -1)), "fc2.weight": Codebook(8, (1, 4))})),
        "float": [],
    }
    for result in found:
        cell = result["cell"]
        if cell["seed"] == 0 and cell["method"] != "float":
            share = 0.5 if cell["method"] == "scalar" else 0.9
            result["result"] |= {"coded_bytes": int(share * result["result"]["bytes"]), "sketch": drawn[cell["method"]]}
    return found


@pytest.fixture(scope="module")
def page(results: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(results, path, command="bitbook study --dataset digits", versions={"bitbook": "0.1.0"})


@pytest.fixture(scope="module")
def desktop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("desktop")) as window:
        yield window


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("phone"), width=390, height=844, phone=True) as window:
        yield window


def column(window: Browser, number: int) -> list[str]:
    return window.run("return [...find('table').tBodies[0].rows].map(row => row.cells[arguments[0]].innerText)", number)


def front(window: Browser) -> set[str]:
    return set(window.run("return [...document.querySelectorAll('tr.best')].map(row => row.cells[0].innerText.trim())"))


def test_it_opens_offline_without_a_complaint(desktop: Browser, page: Path) -> None:
    desktop.open(page)
    assert desktop.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert desktop.errors() == []
    assert desktop.run("return document.querySelectorAll('svg.chart').length") == 3
    assert "recipes" in desktop.text("#count") and "7 of 13" in desktop.text("#count")


def test_a_whole_experiment_loads_within_two_seconds(desktop: Browser, tmp_path: Path) -> None:
    """As many recipes, starts and trainings as the MNIST study has, and as many pictures, all different."""
    generator = random.Random(0)
    drawn = sketched(Plan({"fc1.weight": Codebook(16, (1, -1)), "fc?.weight": Codebook(64, (1, 2))}))
    results = []
    for recipe in mnist_recipes():
        for epochs in (5, 30):
            for tune in ({"epochs": 5, "lr": 0.01, "batch": 64}, None):
                size, right = int(3000 * 100 ** generator.random()), generator.randrange(10, 50)
                start = {"epochs": epochs, "lr": 0.1, "batch": 64}
                one = made(recipe.method, recipe.name, size, right, family=recipe.family, start=start, tune=tune)
                noise = generator.randbytes(8000).hex()  # as large as rows of 28 × 28
                one["result"] |= {
                    "coded_bytes": size // 2,
                    "sketch": [{**drawn[0], "rows": {"before": noise, "after": noise[::-1]}}, *drawn[1:]],
                }
                results.append(one)
    path = write_report(results, tmp_path / "report.html", command="bitbook study", versions={})
    assert len(points(results)) > 300 and path.stat().st_size > 5_000_000
    waited, used = [], []
    for _ in range(2):  # either measure, as other processes may hold the processor meanwhile
        before = desktop.processor()
        desktop.open(path)
        assert desktop.errors() == []
        waited.append(float(desktop.run("return document.documentElement.dataset.ready")) / 1000)
        used.append(desktop.processor() - before)
        if waited[-1] < TOO_LONG:
            return
    assert min(used) < TOO_LONG, f"ready after {waited} s, {used} s of the processor in all processes"


def test_a_point_tells_recipe_bytes_accuracy_and_its_command(
    desktop: Browser, page: Path, results: list[dict[str, Any]]
) -> None:
    desktop.open(page)
    wanted = next(i for i, p in enumerate(points(results)) if p.recipe == "rows, 2 bits" and p.group.training != "none")
    point = points(results)[wanted]
    mark = desktop.run("return document.querySelector(`[data-index='${arguments[0]}']`)", wanted)
    desktop.run("arguments[0].scrollIntoView({block: 'center'})", mark)
    move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": mark}
    actions = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
    desktop.command("POST", "/actions", {"actions": [actions]})
    desktop.wait("return find('hover').innerText.includes('rows, 2 bits')")
    said = desktop.text("#hover")
    assert "rows, 2 bits" in said and "2,700 bytes, entropy-coded 2,430" in said
    mean, low, _ = point.test.interval
    assert f"test {mean:.2f} ± {mean - low:.2f} %" in said
    desktop.click(mark)
    detail = desktop.text("#detail")
    for words in ("rows, 2 bits", "2,700 bytes, entropy-coded 2,430", f"{mean:.2f} ± {mean - low:.2f} %", "whole file"):
        assert words in detail
    assert desktop.text("#command") == repeat_command(point.example["cell"])
    desktop.wait("return [...document.querySelectorAll('#detail img')].every(i => i.complete)")
    sizes = desktop.run(
        "return [...document.querySelectorAll('#detail img')].map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert sizes == [[71, 8], [71, 8], [35, 8], [8, 4]]  # rows before and after, 4 codewords as images, 8 as columns
    assert desktop.run("return document.querySelectorAll('#detail .weights svg').length") == 3
    assert desktop.run("return location.hash") == f"#trial-{point.cells[0]}"
    desktop.click("#detail .close")
    desktop.wait("return !find('detail').open && location.hash === ''")
    desktop.open(page, f"#trial-{point.cells[0]}")
    assert desktop.text("#command") == repeat_command(point.example["cell"])
    desktop.click("#detail .close")
    desktop.run("open(points.find(p => p.recipe === 'scalar, 0 bits'))")
    levels = desktop.run("return document.querySelectorAll('#detail .weights svg:first-of-type circle title').length")
    assert 3 < levels <= 3 * 7
    assert desktop.errors() == []


def test_the_front_follows_the_kind_of_bytes(desktop: Browser, page: Path) -> None:
    desktop.open(page)
    assert front(desktop) == {"rows, 0 bits", "rows, 1 bits", "rows, 2 bits", "float, float32"}
    desktop.click("#size label:last-of-type")
    assert front(desktop) == {"scalar, 0 bits", "scalar, 1 bits", "scalar, 2 bits"}
    assert "1 of 7 recipes have no entropy-coded size" in desktop.text("#missing")
    assert "bytes of the entropy-coded file" in desktop.text("#charts")
    desktop.click("#best")
    assert len(column(desktop, 0)) == 3
    desktop.click("#size label:first-of-type")
    assert len(column(desktop, 0)) == 4 and desktop.text("#missing") == ""


def test_the_table_sorts_and_filters(desktop: Browser, page: Path) -> None:
    desktop.open(page)
    sizes = [int(text.replace(",", "")) for text in column(desktop, 1)]
    assert sizes == sorted(sizes)
    head = desktop.run("return find('table').tHead.rows[0].cells[4].firstChild")
    desktop.click(head)
    tests = [float(text.split()[0]) for text in column(desktop, 4)]
    assert tests == sorted(tests) and len(set(tests)) > 2
    desktop.click(desktop.run("return find('table').tHead.rows[0].cells[4].firstChild"))
    assert [float(text.split()[0]) for text in column(desktop, 4)] == tests[::-1]
    assert desktop.run("return find('table').tHead.rows[0].cells[4].ariaSort") == "descending"
    desktop.click(desktop.run("return find('table').tHead.rows[0].cells[2].firstChild"))
    assert column(desktop, 2)[-1] == ""  # what has no number comes last
    desktop.write("#text", "rows 2")
    assert [name.strip() for name in column(desktop, 0)] == ["rows, 2 bits"]
    desktop.click("#everywhere")
    assert len(column(desktop, 0)) == 2
    desktop.open(page)
    desktop.write("#most", "2000")
    desktop.write("#least", "70")
    assert {name.strip() for name in column(desktop, 0)} == {"rows, 1 bits", "scalar, 1 bits"}


def test_without_coded_sizes_there_is_nothing_to_choose(desktop: Browser, tmp_path: Path) -> None:
    results = [made("scalar", f"{i} bits", 1000 * i, 30 + i) for i in (1, 2, 3)]
    desktop.open(write_report(results, tmp_path / "report.html", command="x", versions={}))
    assert desktop.run("return find('size').offsetHeight") == 0 and desktop.errors() == []
    heads = desktop.run("return [...find('table').tHead.rows[0].cells].map(cell => cell.innerText)")
    assert "entropy-coded" not in heads and "test, %" in heads
    desktop.click("#table tbody tr")
    assert "whole file" in desktop.text("#detail") and "Weights before" not in desktop.text("#detail")


def test_pictures_enlarge_and_single_curves_out(desktop: Browser, page: Path) -> None:
    desktop.open(page)
    before = desktop.run("return document.querySelector('svg.chart').clientWidth")
    desktop.click("figure > button")
    assert desktop.run("return document.querySelector('svg.chart').clientWidth") > 2 * before
    desktop.click("figure > button")
    desktop.click(".names button")
    assert desktop.run("return document.querySelectorAll('.curve.dim').length") == 2
    desktop.click(".names button")
    assert desktop.run("return document.querySelectorAll('.curve.dim').length") == 0
    desktop.click("#only")
    assert desktop.run("return document.querySelectorAll('.point').length") == 4
    desktop.run("find('group').value = 1 - state.group; find('controls').onchange()")
    assert "6 of 13" in desktop.text("#count")


def test_it_fits_a_phone(phone: Browser, page: Path) -> None:
    phone.open(page)
    assert phone.run("return [window.innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    widths = phone.run("return [...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width)")
    assert all(340 < width <= 390 for width in widths)
    shown = phone.run("return [...find('table').tHead.rows[0].cells].filter(c => c.offsetWidth).map(c => c.innerText)")
    assert [name.split(" ▲")[0] for name in shown] == ["recipe", "bytes", "test, %"]
    assert phone.run("return find('table').offsetWidth <= find('table').parentNode.clientWidth")
    sizes = "[...document.querySelectorAll('main *')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert phone.run(f"return Math.min(...{sizes})") >= 10
    phone.click("#table tbody tr")
    box = phone.run("const b = find('detail').getBoundingClientRect(); return [b.left, b.right]")
    assert box[0] >= 0 and box[1] <= 390
    assert phone.run("return find('detail').scrollWidth <= find('detail').clientWidth") and phone.errors() == []


def test_paper_shows_pictures_and_the_front(desktop: Browser, page: Path) -> None:
    desktop.open(page)
    desktop.emulate(media="print")
    try:
        assert desktop.run("return [...document.forms].every(form => form.offsetHeight === 0)")
        rows = "return [...find('table').tBodies[0].rows].filter(row => row.offsetHeight).length"
        assert desktop.run(rows) == 4
        assert desktop.run("return [...document.querySelectorAll('svg.chart')].every(s => s.clientHeight > 100)")
        unscrolled = "const ul = document.querySelector('.sentences ul'); return ul.scrollHeight <= ul.clientHeight"
        assert desktop.run(unscrolled)
    finally:
        desktop.emulate(media="")
    paper = desktop.printed()
    assert paper.startswith(b"%PDF") and 1 <= paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") <= 3
