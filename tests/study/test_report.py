"""The page is safe, needs no network and holds every number; the sentences follow from the data."""

import json
import re
from html.parser import HTMLParser

import pytest
from tests.study.test_tables import TUNE, made, made_curve

from bitbook.errors import StudyError
from bitbook.study.report import all_savings, headlines, installed_versions, main_group, write_all, write_report
from bitbook.study.report.page import SCRIPTS, SHAPES
from bitbook.study.report.page import read as read_source
from bitbook.study.tables import points, repeat_command

VERSIONS = {"bitbook": "0.1.0"}
RIGHT = [30, 36, 42, 46]
SIZES = [1000, 1400, 2000, 3000]


def study(vector=1.5, fused=0.75, tune=TUNE):
    """Scalar, vectors that need `vector` times its bytes, and fused ones that need `fused` times its bytes."""
    return [
        *made_curve("float", [9000], [47], family="float", tune=tune),
        *made_curve("scalar", SIZES, RIGHT, tune=tune),
        *made_curve("rows", [int(vector * size) for size in SIZES], RIGHT, family="vector", tune=tune),
        *made_curve("rows, 4-bit centroids", [int(fused * size) for size in SIZES], RIGHT, family="fused", tune=tune),
    ]


def as_float32(results):
    """The float method's point is named float32, by which the report knows the reference."""
    return [
        made("float", "float32", 9000, 47 + r["cell"]["seed"], family="float", seed=r["cell"]["seed"])
        if r["cell"]["method"] == "float" else r
        for r in results
    ]  # fmt: skip


class Page(HTMLParser):
    """Elements of a page, and the texts in them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def text_of(self, **wanted):
        return next(t for (_, a), t in zip(self.elements, self.texts, strict=True) if wanted.items() <= a.items())


def read(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    return text, page, json.loads(page.text_of(id="data"))


# --- the page


def test_the_page_is_one_file_that_needs_no_other(tmp_path):
    path = write_report(study(), tmp_path / "report.html", command="bitbook study", versions=VERSIONS)
    text, page, data = read(path)
    assert not [a for _, a in page.elements if {"src", "href"} & a.keys()]
    assert "default-src 'none'" in page.elements[[t for t, _ in page.elements].index("meta") + 2][1]["content"]
    assert [t for t, _ in page.elements].count("script") == 3 and len(text) < 100_000
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert "@media print" in text and len(json.dumps(data)) < 40_000
    assert (
        write_report(study()[::-1], tmp_path / "again.html", command="bitbook study", versions=VERSIONS).read_text(
            encoding="utf-8"
        )
        == text
    )


def test_the_page_holds_every_point_and_its_ledger(tmp_path):
    results = as_float32(study())
    _, _, data = read(write_report(results, tmp_path / "report.html", command="x", versions=VERSIONS))
    found = points(results)
    assert len(data["points"]) == len(found)
    for shown, point in zip(data["points"], found, strict=True):
        assert data["methods"][shown["method"]]["name"] == point.method and shown["name"] == point.name
        assert shown["test"] == pytest.approx(
            [*point.test.interval, *(f(point.test.accuracy) for f in (min, max))], abs=1e-4
        )
        rows = data["ledgers"][shown["ledger"]]
        assert sum(row[4] for row in rows) == point.sizes[0] == shown["bytes"][0]
        first = point.example["result"]["ledger"]["rows"][1]
        assert [data["words"][i] for i in rows[1][:3]] == [first["tensor"], first["part"], first["recipe"]]
        assert data["command"] + shown["cell"] == repeat_command(point.example["cell"])
        assert shown["front"] == [point.front, False] and shown["id"] == point.cells[0]
    assert data["groups"][data["main"]]["start"] == "5 epochs"


def test_hostile_names_stay_text(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&<!--"
    results = [made(evil, evil, 500 + i, 30, family=evil, model=evil, seed=i) for i in range(2)]
    path = write_report(results, tmp_path / "report.html", command=evil, versions={evil: evil})
    _, page, data = read(path)
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not [a for tag, a in page.elements if tag == "img" or "onerror" in a]
    assert data["methods"][0]["name"] == evil and data["points"][0]["model"] == evil
    written = write_all(results, tmp_path, command="x", versions={evil: evil})
    summary = next(p for p in written if p.name == "summary.md").read_text(encoding="utf-8")
    assert "script" in summary and not re.search(r"(?<!\\)<(script|img)", summary)


def test_the_script_writes_text_only():
    """Whatever a name holds, nothing in the script makes markup of it."""
    script = "".join(map(read_source, SCRIPTS))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?:(?!//www.w3.org/2000)", script
    )
    ids = set(re.findall(r'find\("(\w+)"\)', script))
    assert ids <= set(re.findall(r'id="(\w+)"', read_source("page.html")))
    shapes = re.search(r"const SHAPES = \[.*?\];", script, re.DOTALL)
    assert shapes and len(re.findall('"M', shapes[0])) == SHAPES


def test_both_fronts_and_equal_pictures_once(tmp_path):
    """The front by coded bytes is its own, and leaves out what has none; a picture that stands twice is kept once."""
    results = [
        made("a", "1", 1000, 40), made("a", "2", 1200, 41), made("a", "3", 1500, 42), made("a", "4", 1600, 48),
    ]  # fmt: skip
    for result, coded in zip(results, (900, 700, 1400, None), strict=True):
        drawn = {"tensor": "fc1.weight", "rows": {"before": "one", "after": result["cell"]["recipe"]}}
        result["result"] |= {"sketch": [drawn]} | ({} if coded is None else {"coded_bytes": coded})
    _, page, data = read(write_report(results, tmp_path / "report.html", command="x", versions=VERSIONS))
    assert [p["front"] for p in data["points"]] == [[True, False], [True, True], [True, True], [True, False]]
    assert [p["coded"] for p in data["points"]] == [900, 700, 1400, None]
    sketches = json.loads(page.text_of(id="sketches"))
    assert sorted(sketches["pictures"]) == ["1", "2", "3", "4", "one"]
    assert all(sketches["pictures"][of[0]["rows"]["before"]] == "one" for of in sketches["points"])


def test_nothing_to_report(tmp_path):
    with pytest.raises(StudyError, match="no results"):
        write_report([], tmp_path / "report.html", command="x", versions=VERSIONS)
    with pytest.raises(StudyError, match="no results"):
        write_all([], tmp_path, command="x")


# --- the sentences


def said(results):
    found = points(results)
    return " ".join(headlines(results, found, all_savings(found, repeats=20)))


def test_headlines_follow_the_data():
    text = said(as_float32(study(vector=1.5, fused=0.75)))
    assert "39 trials: 13 recipes, up to 3 training seeds each" in text
    assert "the float32 file has 9,000 bytes and 96.00 ± 4.97 % test accuracy" in text
    assert re.search(
        r"Vector against scalar .*?1 larger; the best, rows, needs 50\.0 % \[50\.0, 50\.0\] more bytes", text
    )
    assert re.search(
        r"Fused against scalar .*?1 smaller; the best, rows, 4-bit .*? needs 25\.0 % \[25\.0, 25\.0\] fewer", text
    )
    assert re.search(r"Fused against float32 centroids .*? needs 50\.0 % \[50\.0, 50\.0\] fewer bytes than rows,", text)

    text = said(as_float32(study(vector=0.5, fused=2)))
    assert re.search(r"Vector against scalar .*?1 smaller; the best, rows, needs 50\.0 % .*? fewer bytes", text)
    assert re.search(r"Fused against scalar .*?1 larger; .*? needs 100\.0 % \[100\.0, 100\.0\] more bytes", text)


def test_headlines_compare_families_at_the_size_of_the_scalar_file():
    results = as_float32([
        *study(vector=0.5),
        made("scalar", "8 bits", 4000, 47), made("scalar", "8 bits", 4000, 48, seed=1),
    ])  # fmt: skip
    text = said(results)
    assert "scalar, 8 bits: 4,000 bytes" in text and "No fused and no vector recipe is within it" in text
    assert re.search(
        r"In no more bytes than scalar, 8 bits \(4,000\), the best vector recipe is rows, 3 bits \(1,500 bytes\): −",
        text,
    )
    nothing = said(as_float32(made_curve("float", [9000], [47]) + made_curve("scalar", [100], [10])))
    assert "No scalar recipe is within it" in nothing


def test_undecided_and_single_seeds_are_not_verdicts():
    noisy = [
        *(made("scalar", f"{i} bits", 1000 * i, 20 + 5 * i + s, seed=s) for i in (1, 2, 3) for s in range(3)),
        *(
            made("rows", f"{i}", 1000 * i, 20 + 5 * i + 2 - s, family="vector", seed=s)
            for i in (1, 2, 3)
            for s in range(3)
        ),
    ]
    assert "1 not told apart" in said(noisy)
    single = [r for r in study() if r["cell"]["seed"] == 0]
    assert re.search(r"Vector against scalar .*?1 not told apart; the best, rows, needs 50\.0 % more", said(single))


def test_diverged_trainings_are_named():
    results = study()
    results[-1]["result"] |= {"diverged": True}
    results[-1]["result"]["rows"][0]["loss"] = float("nan")
    assert "Trainings that diverged" in said(results) and "3 bits" in said(results).rpartition("diverged")[2]
    assert "diverged" not in said(study())


def test_main_group_is_validated_long_and_trained():
    long = {"epochs": 30, "lr": 0.1}
    results = [
        made("m", "a", 100, 1), made("m", "a", 100, 1, tune=None), made("m", "a", 100, 1, start=long, tune=None),
        made("m", "a", 100, 1, start=long), made("m", "a", 100, 1, start={**long, "epochs": 40}, holdout=0),
    ]  # fmt: skip
    assert main_group(points(results)) == ("digits", 100, "30 epochs", "5 epochs")


# --- the folder


def test_a_study_leaves_a_folder(tmp_path):
    results = as_float32(study()) + study(tune=None) + made_curve("source", [800], [40], holdout=0)
    paths = write_all(results, tmp_path / "out", command="bitbook study --dataset digits", versions=VERSIONS)
    assert sorted(p.name for p in paths) == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert {p.name for p in paths} == {
        "trials.csv", "points.json", "report.html", "summary.md",
        "size_accuracy.svg", "size_accuracy.png", "fused_minus_float.svg", "fused_minus_scalar.svg",
    }  # fmt: skip
    summary = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("# digits: size and accuracy\n")
    assert "bitbook study --dataset digits" in summary and "bitbook 0.1.0" in summary
    assert "| rows, 4-bit centroids, 0 bits | 750 |" in summary
    assert "| rows | scalar | −50.0 | −50.0 to −50.0 |" in summary
    assert "own configurations" in summary and "| 0 bits | 5 epochs |" in summary
    rows = len((tmp_path / "out" / "trials.csv").read_text(encoding="utf-8").splitlines()) - 1
    assert rows == sum(len(r["result"]["rows"]) for r in results)
    assert len(json.loads((tmp_path / "out" / "points.json").read_text(encoding="utf-8"))) == len(points(results))


def test_versions_are_the_installed_ones():
    import torch

    found = installed_versions()
    assert found["torch"] == torch.__version__ and {"python", "platform", "bitbook"} <= found.keys()
