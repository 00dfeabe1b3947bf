from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Generator

from bitbook import ECSQ, Codebook, Float
from bitbook.coding.rans import Rans
from bitbook.errors import BudgetError, PlanError, StudyError
from bitbook.study.rd import rd
from bitbook.study.rd.plots import distance_plot, gains_plot
from bitbook.theory.sources import Gauss, Laplace, StudentT

COARSE = {"ECSQ": (0.348, 0.0889), "Lloyd–Max": (0.3634, 0.1175)}


@pytest.fixture(scope="module")
def gauss() -> rd.Subject:
    return rd.drawn(Gauss(), 20_000)


@pytest.mark.parametrize(("name", "tolerance"), [("ECSQ", 0.03), ("Lloyd–Max", 0.03)])
def test_published_errors_in_real_bytes(gauss: rd.Subject, name: str, tolerance: float) -> None:
    """By the bytes of codes alone: of 20,000 samples, a header of a hundred bytes is a 25th of a bit."""
    (method,) = (m for m in rd.METHODS if m.name == name)
    w = gauss.draw(0)
    for bits, wanted in zip((1.0, 2.0), COARSE[name], strict=True):
        found = rd.measure(method, w, bits, gauss.coder, Generator().manual_seed(0))
        codes = 8 * found.code_bytes / w.numel()
        assert found.mse * 4 ** (codes - bits) == pytest.approx(wanted, rel=tolerance)
        assert found.bits == 8 * found.bytes / w.numel() and 0 < found.code_bytes < found.bytes
        if not method.fixed:
            assert bits * 0.98 <= found.bits <= bits


@pytest.mark.parametrize("method", rd.METHODS, ids=lambda m: m.name)
def test_every_method_stays_above_the_bound_and_below_its_target(method: rd.Method) -> None:
    subject = rd.drawn(Laplace(), 10_000)
    curve = rd.bound_of(subject, (2.0,))
    targets = (0.5, 1.0) if not method.fixed else (0.5, 2.0)
    rows = list(rd.rows(subject, targets, 1, [method], lambda row: False))
    for row in rows:
        assert row["mse"] > curve(row["bits"])
        assert method.fixed or row["bits"] <= row["target"]
        assert row["bits"] == 8 * row["bytes"] / row["samples"]
    assert rows or "d=8" in method.name or "d=4" in method.name


def test_rates_that_are_no_use_are_left_out() -> None:
    books = {m.name: m for m in rd.METHODS}
    assert books["k-means, d=8"].rates(10_000, (0.25, 4)) != books["k-means, d=8"].rates(10_000_000, (0.25, 4))
    assert max(books["k-means, coded, d=8"].rates(1_000_000, rd.TARGETS), default=0) <= 1.5
    assert books["ECSQ"].rates(1000, rd.TARGETS) == list(rd.TARGETS)
    assert books["Lloyd–Max"].rates(10**6, (1.0, 2.0)) == [1.0, math.log2(3), 2.0]


def test_a_method_that_cannot_be_brought_to_a_rate_says_so(gauss: rd.Subject) -> None:
    deaf = rd.Searched("deaf", lambda w, x, target, g: rd.quantize(Codebook(4, (1, 1)), w), 1.0, 1.0)
    with pytest.raises(BudgetError, match="deaf does not come within 2% below 1.0 bits"):
        rd.measure(deaf, gauss.draw(0), 1.0, Rans(), Generator().manual_seed(0))


def test_draws_are_repeatable_and_of_unit_power() -> None:
    for source in (Gauss(), Laplace(), StudentT(5)):
        subject = rd.drawn(source, 20_000)
        w = subject.draw(1)
        assert w.shape == (20, 1000) and torch.equal(w, rd.drawn(source, 20_000).draw(1))
        assert not torch.equal(w, subject.draw(0))
        if not isinstance(source, StudentT):
            assert float(w.double().square().mean()) == pytest.approx(1, abs=1e-6)
    with pytest.raises(PlanError, match="multiple of 1,000"):
        rd.drawn(Gauss(), 1500)


def test_a_tensor_is_scaled_by_its_variance_and_cut_by_rows() -> None:
    w = 0.02 * torch.randn(64, 8, 5, 5, generator=Generator().manual_seed(0))
    subject = rd.tensor("conv", w, 6000)
    assert subject.draw(3).shape == (30, 200) and not subject.repeats
    method = rd.stepped("ECSQ", ECSQ(2, points=Float()), price=0.116)
    (row,) = rd.rows(subject, (2.0,), 1, [method], lambda row: False)
    assert 0.05 < row["mse"] < 0.15 and row["variance"] == pytest.approx(4e-4, rel=0.05)
    (point,) = rd.summarised([row], {"conv": rd.bound_of(subject, (2.0,))})
    assert 1 < point.above < 2.5 and 0 < point.side_share < 0.2


def test_rows_are_kept_and_known_again(tmp_path: Path, gauss: rd.Subject) -> None:
    table = rd.Rows(tmp_path / "rd.csv")
    method = [m for m in rd.METHODS if m.name == "Lloyd–Max"]
    for row in rd.rows(gauss, (1.0, 2.0), 2, method, table.__contains__):
        table.add(row)
    again = rd.Rows(tmp_path / "rd.csv")
    assert [row["bytes"] for row in again.rows] == [row["bytes"] for row in table.rows] and len(again.rows) == 6
    assert not list(rd.rows(gauss, (1.0, 2.0), 2, method, again.__contains__))
    points = rd.summarised(again.rows, {"Gauss": rd.bound_of(gauss, (2.0,))})
    assert len(points) == 3 and all(0 <= p.spread < 0.05 and 1 < p.above < 5 for p in points)
    text = rd.document(points, {"Gauss": rd.bound_of(gauss, (2.0,))}, command="bitbook rd", picture="rd.svg")
    assert "| Lloyd–Max | 1.0" in text and "- At 2 bits, Lloyd–Max is nearest" in text
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(PlanError, match="has the columns a, b"):
        rd.Rows(tmp_path / "other.csv")


def test_pictures_are_the_same_file_for_the_same_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    point = rd.Point("Gauss", "ECSQ", 2.0, 2.0, 0.089, 0.0, 1.53, 1000, 0.1, 1.0)
    points = [point, point._replace(method="below", above=-0.3), point._replace(source="w", bits=1.0)]
    first, second = (distance_plot(points, {"ECSQ": False}, tmp_path / name) for name in ("a.svg", "b.svg"))
    assert first.read_bytes() == second.read_bytes()
    bars = {"vectors": {"shape": 1.0, "memory": -0.2}, "scalars": {"entropy coding": 1.2}}
    assert "entropy coding" in gains_plot(bars, tmp_path / "c.svg", title="w").read_text()
    assert gains_plot(bars, tmp_path / "d.png", title="w").stat().st_size > 5000
    with pytest.raises(StudyError, match="no points"):
        distance_plot([], {}, tmp_path / "e.svg")
