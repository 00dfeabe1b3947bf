"""What a result keeps of weights adds up, and its pictures are PNGs that show the weights."""

import base64
import io
import json

import pytest
import torch

from bitbook import Binary, Codebook, Plan, Pruned, Uniform, compress
from bitbook.models import build_model
from bitbook.study.grid import study_cells
from bitbook.study.sketch import BINS, MOST_CODEWORDS, ROWS, sketch
from bitbook.study.trial import run_trial


@pytest.fixture
def model():
    return build_model("mlp-64-32-16-10", seed=0)


def start(model):
    return {name: w.detach() for name, w in model.named_parameters()}


def pixels(picture):
    """Red, green and blue of a picture, `(height, width, 3)`."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(picture)))
    image.load()  # checks the checksums, too
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(image.height, -1, 3)


def test_counts_are_the_weights(model):
    plan = Plan({"fc1.weight": Uniform(3), "fc2.weight": Codebook(40, (1, 4)), "fc3.weight": None})
    found = sketch(start(model), compress(model, plan), (1, 8, 8))
    assert [one["tensor"] for one in found] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    json.dumps(found, allow_nan=False)
    for one in found:
        w = model.get_parameter(one["tensor"])
        assert sum(one["before"]) == w.numel() and len(one["before"]) == BINS
        after = [n for _, n in one["levels"]] if "levels" in one else one["after"]
        assert sum(after) == w.numel() and one["low"] < one["high"]
    assert len(found[0]["levels"]) <= 7 and "after" in found[1] and found[2]["before"] == found[2]["after"]
    assert found[0].keys() & {"rows", "codewords"} == {"rows"} and found[1].keys() & {"rows", "codewords"} == {
        "codewords"
    }


def test_rows_are_images_and_codewords_of_rows_too(model):
    artifact = compress(model, Plan({"fc1.weight": Codebook(4, (1, -1))}))
    (one, *_) = sketch(start(model), artifact, (1, 8, 8))
    before, after = (pixels(one["rows"][when]) for when in ("before", "after"))
    assert before.shape == after.shape == (8, 9 * ROWS - 1, 3)
    assert (before[:, 8] == 255).all()  # a gap
    w = model.get_parameter("fc1.weight")
    first = w[w.norm(dim=1).argmax()].reshape(8, 8)
    orange = before[:, :8, 0] > before[:, :8, 2]
    strong = first.abs() > 0.1 * w.abs().max()
    assert torch.equal(orange[strong], first[strong] > 0)
    assert len({after[:, 9 * i : 9 * i + 8].numpy().tobytes() for i in range(ROWS)}) <= 4
    assert one["codewords"] | {"picture": ""} == {"picture": "", "shown": 4, "total": 4, "each": "image"}
    assert pixels(one["codewords"]["picture"]).shape == (8, 9 * 4 - 1, 3)


def test_codewords_of_vectors_are_columns_the_most_used_first(model):
    artifact = compress(model, Plan({"fc*.weight": Codebook(100, (1, 4))}))
    one = sketch(start(model), artifact, (1, 8, 8))[0]
    assert pixels(one["codewords"]["picture"]).shape == (4, MOST_CODEWORDS, 3)
    assert one["codewords"]["total"] == 100 and one["codewords"]["each"] == "column"
    long = sketch(start(model), compress(model, Plan({"fc2.weight": Codebook(5, (1, -1))})), (1, 8, 8))[1]
    assert pixels(long["codewords"]["picture"]).shape == (5, 32, 3) and long["codewords"]["each"] == "row"


@pytest.mark.parametrize("shape", [(8, 8), (64,), (2, 4, 8), (4, 4, 4)])
def test_only_squares_of_one_channel_become_images(model, shape):
    found = sketch(start(model), compress(model, Plan({"fc*.weight": Binary()})), shape)
    assert ("rows" in found[0]) == (shape == (8, 8))
    assert all("rows" not in one for one in found[1:])


def test_constant_and_pruned_tensors(model):
    with torch.no_grad():
        model.get_parameter("fc1.weight").fill_(0.25)
        model.get_parameter("fc2.weight").zero_()
    found = sketch(start(model), compress(model, Plan({"fc*.weight": Pruned(0.5, Uniform(4))})), (1, 8, 8))
    json.dumps(found, allow_nan=False)
    assert all(sum(one["before"]) == model.get_parameter(one["tensor"]).numel() for one in found)


def test_a_trial_of_the_first_seed_reports_both(digits):
    """Coded bytes and a sketch, of one seed only; what a cell says, and so its identity, is as before."""
    cell = next(c for c in study_cells("digits", 2) if c["method"] == "scalar" and "tune" not in c["phases"][0])
    cell = {**cell, "start": {"epochs": 1, "lr": 0.1, "batch": 256}}
    first, second = (run_trial({**cell, "seed": seed}) for seed in (0, 1))
    assert {"coded_bytes", "sketch"} <= first.keys() and not {"coded_bytes", "sketch"} & second.keys()
    assert first["coded_bytes"] < first["bytes"]
    assert [one["tensor"] for one in first["sketch"]] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert run_trial({**cell, "seed": 1, "coded": True})["coded_bytes"] < second["bytes"]
