from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import bitbook
from bitbook.artifact import read, read_ledger
from bitbook.cli import INTERRUPTED, MISTAKE, app, main
from bitbook.data import DATASETS, Dataset
from bitbook.models import build_model

MODEL = "mlp-64-16-10"
FUSED = "Codebook(32, (1, 4), centroids=Uniform(5))"
COMMANDS = ("study", "search", "compress", "decompress", "inspect", "diff", "evaluate", "rd", "explain")
MODULE = """
import torch
from torch import nn
from bitbook.data import Dataset
from bitbook.models import mlp

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.b.weight = self.a.weight
    def forward(self, x):
        return self.norm(self.b(self.a(x)))

def data():
    x, y = torch.linspace(-1, 1, 240).reshape(40, 6), torch.arange(40) % 6
    return Dataset("own", x[:30], y[:30], x[30:], y[30:], 6, (6,))

wide = lambda: nn.Linear(64, 64)
vector = lambda: nn.BatchNorm1d(64)
number = lambda: 3
constant = 3
"""


@pytest.fixture(scope="module")
def trained(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A trained float model and the file of its weights."""
    model = build_model(MODEL, seed=0)
    training = bitbook.Training(8, 0.1, 32, 0.9)
    bitbook.run_epochs(model, digits.train_x, digits.train_y, training, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("trained") / "m.pt"
    torch.save(model.state_dict(), path)
    return model.eval(), path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder with a module of the user's, importable as from a shell."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("mine", None)


def run(*arguments: object) -> str:
    """What a command prints; it must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: object) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(run(*arguments, "--json"), parse_constant=refuse)


def same_bytes(path: Path, artifact: bitbook.Artifact) -> bool:
    other = path.with_name("other.safetensors")
    bitbook.save(artifact, other)
    return path.read_bytes() == other.read_bytes()


def test_round_trip_without_data_is_the_api(trained: tuple[nn.Module, Path], folder: Path) -> None:
    model, weights = trained
    small, plain = folder / "small.safetensors", folder / "plain.safetensors"
    said = run_json("compress", "--model", MODEL, "--weights", weights, "--recipe", FUSED, "-o", small)
    plan = bitbook.Plan(
        {"fc?.weight": bitbook.Codebook(32, (1, 4), centroids=bitbook.Uniform(5))},
    )
    artifact = bitbook.compress(model, plan)
    assert same_bytes(small, artifact)
    ledger = read_ledger(small)
    assert said["bytes"] == ledger.total == small.stat().st_size == sum(t["bytes"] for t in said["tensors"])
    assert said["ratio_to_float32"] == pytest.approx(4 * sum(p.numel() for p in model.parameters()) / ledger.total)
    tensors = {t["tensor"]: t for t in said["tensors"]}
    w = model.get_parameter("fc1.weight").double()
    error = ((w - artifact.decode("fc1.weight")).square().sum() / w.square().sum()).item()
    assert tensors["fc1.weight"]["relative_mse"] == pytest.approx(error)
    assert tensors["fc1.weight"]["snr_db"] == pytest.approx(-10 * math.log10(error))
    assert tensors["fc1.bias"]["dense"] == "no pattern names it"
    assert "dense" not in tensors["fc1.weight"] and "relative_mse" not in tensors["fc1.bias"]

    assert run_json("inspect", small)["rows"] == json.loads(json.dumps(ledger.to_json()["rows"]))
    table = run("inspect", small)
    for size in ledger.by_tensor().values():
        assert f" {size:,} " in table
    assert "centroids.codes" in table and f"{ledger.total:,} bytes" in table

    run("decompress", small, "-o", plain)
    expected = bitbook.load(small, build_model(MODEL, seed=1)).state_dict()
    state = load_file(plain)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    again = folder / "again.safetensors"
    run("compress", "--model", MODEL, "--weights", plain, "--recipe", "Float()", "-o", again)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read(again).state_dict().items())


def test_calibration_is_the_api(trained: tuple[nn.Module, Path], folder: Path, digits: Dataset) -> None:
    model, weights = trained
    small = folder / "small.safetensors"
    given = ("compress", "--model", MODEL, "--weights", weights, "--recipe", "Uniform(3)", "-o", small)
    said = run(*given, "--data", "digits", "--calibrate", 200)
    assert "fc1.weight: output error" in said and "of that without feedback" in said
    parts = bitbook.data.split(digits, len(digits.train_x) // 10)
    patterns = {name: bitbook.Uniform(3) for name, p in model.named_parameters() if p.dim() == 2}
    assert same_bytes(small, bitbook.compress(model, bitbook.Plan(patterns), calibration=parts.train_x[:200]))
    run(*given, "--data", "digits", "--calibrate", 200, "--lam", 1e-3)
    cheaper = bitbook.compress(model, bitbook.Plan(patterns), calibration=parts.train_x[:200], lam=1e-3)
    assert same_bytes(small, cheaper)
    for wrong in ((), ("--data", "digits", "--epochs", 1), ("--data", "digits", "--budget", "4KB", "--epochs", 1)):
        with pytest.raises(bitbook.errors.PlanError, match="--calibrate needs --data, and is instead of training"):
            run(*given, "--calibrate", 20, *wrong)


def test_a_budget_without_training_is_the_api(trained: tuple[nn.Module, Path], folder: Path, digits: Dataset) -> None:
    model, weights = trained
    small = folder / "fitted.safetensors"
    given = ("compress", "--model", MODEL, "--weights", weights, "--data", "digits", "-o", small)
    said = run(*given, "--budget", "1.2KB", "--time", "10m")
    assert small.stat().st_size <= 1200
    assert "loss and bytes together" in said and "test: accuracy" in said and "nats per prediction" in said
    parts = bitbook.data.split(digits, len(digits.train_x) // 10)
    assert same_bytes(small, bitbook.compress(model, budget=1200, data=(parts.train_x, parts.train_y)))
    found = run_json(*given, "--bits", 6)
    assert found["bytes"] == found["report"]["size"] <= found["report"]["budget"]
    assert found["report"]["reached"] and {c["tensor"] for c in found["report"]["choices"]} >= {"fc1.weight"}
    assert found["loss"]["test"]["after"] < found["loss"]["test"]["before"] + 0.2


def test_training_and_evaluation_are_the_api(trained: tuple[nn.Module, Path], folder: Path, digits: Dataset) -> None:
    model, weights = trained
    small = folder / "small.safetensors"
    options = ["--data", "digits", "--epochs", 2, "--lr", 0.01, "--batch", 32, "--momentum", 0.9, "--seed", 7]
    options += ["--schedule", "cosine", "--recipe", "Uniform(3)", "--inputs", "Uniform(8)", "--holdout", 200]
    said = run_json("compress", "--model", MODEL, "--weights", weights, *options, "-o", small)
    parts = bitbook.data.split(digits, 200)
    plan = bitbook.Plan({"fc?.weight": bitbook.Uniform(3)}, {"fc?": bitbook.Uniform(8)})
    training = bitbook.Training(2, 0.01, 32, 0.9, "cosine")
    data = (parts.train_x, parts.train_y)
    assert same_bytes(small, bitbook.compress(model, plan, data=data, training=training, seed=7))
    after = bitbook.load(small, build_model(MODEL, seed=0))
    for split, x, y in (
        ("test", digits.test_x, digits.test_y),
        ("validation", parts.val_x, parts.val_y),
        ("train", parts.train_x, parts.train_y),
    ):
        found = bitbook.evaluate(after, x, y)
        arguments = ["evaluate", small, "--model", MODEL, "--data", "digits", "--split", split]
        measured = run_json(*arguments, "--holdout", 200)
        assert (measured["accuracy"], measured["loss"]) == (found.accuracy, found.loss)
        assert measured["examples"] == len(x)
        if split != "train":
            before = bitbook.evaluate(model, x, y).accuracy
            assert said["accuracy"][split] == {"before": before, "after": found.accuracy}
    assert f"test accuracy {said['accuracy']['test']['after']:.2f} %" in run(
        "evaluate", small, "--model", MODEL, "--data", "digits"
    )


def test_plan_file_own_model_and_data_tied_weights_and_buffers(folder: Path) -> None:
    (folder / "plan.json").write_text('{"weights": {"a.weight": ["Uniform", 4], "norm.weight": null}}')
    small, plain = folder / "small.safetensors", folder / "plain.safetensors"
    arguments = ["--model", "mine:Tied", "--plan", "plan.json", "--data", "mine:data", "-o", small]
    said = run_json("compress", *arguments)
    why = {t["tensor"]: t["dense"] for t in said["tensors"] if "dense" in t}
    assert why["norm.weight"] == "by plan" and why["a.bias"] == "no pattern names it"
    assert why["norm.running_mean"] == "a buffer"
    assert said["aliases"] == {"b.weight": "a.weight"} and said["accuracy"].keys() == {"test"}
    text = run("compress", *arguments)
    assert "b.weight is tied to a.weight" in text and "float32, dense: by plan" in text and "% after" in text
    run("decompress", small, "-o", plain)
    state = load_file(plain)
    assert torch.equal(state["a.weight"], state["b.weight"])
    assert state["norm.num_batches_tracked"].dtype is torch.int64


def test_layers_choose_tensors_and_their_inputs(trained: tuple[nn.Module, Path], folder: Path) -> None:
    small = folder / "small.safetensors"
    arguments = ["--model", MODEL, "--weights", trained[1], "--recipe", "Uniform(4)", "--inputs", "Binary()"]
    text = run("compress", *arguments, "--layers", "fc1.*", "--layers", "fc2.bias", "-o", small)
    artifact = read(small)
    coded = {name for name, tensor in artifact.tensors.items() if isinstance(tensor, bitbook.Quantized)}
    assert coded == {"fc1.weight", "fc1.bias", "fc2.bias"} and set(artifact.inputs) == {"fc1", "fc2"}
    assert "the input of fc2 is quantized by Binary(), range: batch" in text
    result = CliRunner().invoke(app, ["decompress", str(small), "-o", str(folder / "plain.safetensors")])
    assert "quantizes the inputs of fc1, fc2" in result.stderr


SMALL = "compress --model mlp-64-16-10 --weights {weights} -o out.safetensors"
EVALUATE = "evaluate small.safetensors --data digits --model"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{SMALL}", "pass either --plan or --recipe"),
        (f"{SMALL} --recipe Uniform(4) --plan plan.json", "pass either --plan or --recipe"),
        (f"{SMALL} --plan plan.json --inputs Uniform(8)", "go with --recipe"),
        (f"{SMALL} --plan broken.json", "broken.json: Expecting"),
        (f"{SMALL} --plan nowhere.json", "nowhere.json"),
        (f"{SMALL} --recipe Uniform(9)", "from 1 to 8"),
        (f"{SMALL} --recipe Unifrom(4)", "no quantizer Unifrom"),
        (f"{SMALL} --recipe Uniform(4) --inputs Codebook(4)", "cannot quantize activations"),
        (f"{SMALL} --recipe Uniform(4) --layers conv*", "'conv*' names no tensor; there are fc1.weight"),
        (f"{SMALL} --recipe Uniform(4,(1,5))", "fc1.weight: "),
        (f"{SMALL} --recipe Uniform(4) --epochs 3", "--epochs needs --data"),
        (f"{SMALL} --recipe Uniform(4) --epochs 3 --data digits --lr -1", "positive learning rate"),
        (f"{SMALL} --recipe Uniform(4) --epochs three", "--epochs"),
        (f"{SMALL} --budget 4KB", "need --data"),
        (f"{SMALL} --budget 4KB --lam 1e-5 --epochs 1 --data digits", "either lam"),
        (f"{SMALL} --budget 4KB --lam 1e-5 --data digits", "--lam: without --epochs"),
        (f"{SMALL} --budget 4KB --recipe Uniform(4) --batch 8 --data digits", "--recipe: without --epochs"),
        (f"{SMALL} --bits 2 --max-drop 1 --data digits", "give one of budget"),
        (f"{SMALL} --bits 2", "need --data"),
        (f"{SMALL} --bits 2 --time 3y --data digits", "'3y' is no time"),
        (f"{SMALL} --recipe Uniform(4) --time 3s", "--time and --finetune go with"),
        (f"{SMALL} --budget 4XB --data digits", "'4XB' is no size"),
        (f"{SMALL} --recipe Uniform(4) --distill", "--distill goes with"),
        (f"{SMALL} --recipe Uniform(4) --data digist", "no data set 'digist'; use digits"),
        (f"{SMALL} --recipe Uniform(4) --data mine:number", "returned int"),
        (f"{SMALL} --recipe Uniform(4) --data mine:data", "does not take the examples of mine:data"),
        (f"{SMALL} --recipe Uniform(4) --data digits --holdout 99999", "cannot be held out"),
        ("compress --model mlp-64-16-10 --recipe Uniform(4) -o o", "are random; pass trained ones"),
        ("compress --model mlp-64-8-10 --weights {weights} --recipe Uniform(4) -o o", "in the model"),
        ("compress --model mpl --recipe Uniform(4) -o o", "no model 'mpl'; there are mlp-784"),
        ("compress --model mine:nothing --recipe Uniform(4) -o o", "cannot be imported"),
        ("compress --model nomodule:nothing --recipe Uniform(4) -o o", "cannot be imported"),
        ("compress --model mine:constant --recipe Uniform(4) -o o", "is a int, not a callable"),
        ("compress --model mine:number --recipe Uniform(4) -o o", "must return an nn.Module"),
        ("compress --model mine:vector --recipe Uniform(4) -o o", "no tensor of the model has two or more"),
        ("compress --model mine:wide --recipe Uniform(4) --data digits -o o", "need (2, 10)"),
        ("compress --model mine:Tied --recipe Uniform(4) -o no/folder/o", "there is no folder"),
        ("compress --model mlp-64-16-10 --weights w.pt --recipe Uniform(4) -o w.pt", "is an input of"),
        ("compress --model mine:Tied --plan plan.json -o ./plan.json", "is an input of this command"),
        ("decompress small.safetensors -o ./small.safetensors", "is an input of this command"),
        ("decompress plan.json -o o", "plan.json: "),
        ("inspect nowhere.safetensors", "nowhere.safetensors"),
        ("inspect plain.safetensors", "no bitbook file"),
        (f"{EVALUATE} mlp-64-8-10", "in the file"),
        (f"{EVALUATE} mlp-64-16-10 --split validation --holdout 0", "no validation examples"),
        (f"{EVALUATE} mlp-64-16-10 --split best", "'best' is not one of"),
        (f"{EVALUATE} mlp-64-16-10 --batch 0", "--batch"),
        ("evaluate small.safetensors --model mlp-64-16-10", "Missing option '--data'"),
        ("rd --source Gaus", "no source 'Gaus'; there are Gauss, Laplace"),
        ("rd --source none", "there is no source"),
        ("rd --method ESCQ", "no method's name contains 'ESCQ'; there are Lloyd–Max; "),
        ("rd --samples 1001 --out {weights}x", "use a multiple of 1,000"),
        ("rd --tensor fc1.weight", "--tensor goes with --weights"),
        ("rd --weights {weights} --tensor conv*", "no tensor has a name like 'conv*'; there are fc1.weight"),
        ("explain nowhere.pt", "nowhere.pt"),
        ("explain {weights} --tensor fc?.bias", "its distribution shows from 1,000 on"),
        ("explain plan.json", "weights come from .safetensors"),
        ("study --dataset cifar", "no grid 'cifar'"),
        ("study --dataset digits --seeds 0", "--seeds"),
        ("studdy", "No such command 'studdy'"),
    ],
)
def test_a_mistake_is_one_clear_line(
    trained: tuple[nn.Module, Path],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: str,
) -> None:
    model, weights = trained
    (folder / "plan.json").write_text("{}")
    (folder / "broken.json").write_text("{")
    torch.save(model.state_dict(), folder / "w.pt")
    bitbook.save(bitbook.compress(model, bitbook.Plan({"*.weight": bitbook.Uniform(4)})), folder / "small.safetensors")
    save_file(dict(model.state_dict()), folder / "plain.safetensors")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(command.format(weights=weights).split()) == MISTAKE
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and words in error and "Traceback" not in error
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_missing_mnist_says_so_before_any_worker_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITBOOK_DATA", str(folder / "none"))
    assert main(["study", "--dataset", "mnist", "--out", "o"]) == MISTAKE
    assert "which is not a folder" in capsys.readouterr().err and not Path("o").exists()


def test_ctrl_c_is_exit_code_130(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitbook.artifact.read_ledger", interrupt)
    (folder / "f").touch()
    assert main(["inspect", "f"]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str) -> None:
    text = run(command, "--help")
    lines = [line.strip() for line in text.splitlines()]
    assert {"Example:", "Examples:"} & set(lines) and "\\b" not in lines
    assert any(line.startswith(f"bitbook {command} ") for line in lines)


def test_study_says_what_it_would_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bitbook.study.grid import study_cells

    text = run("study", "--dataset", "digits", "--seeds", 1, "--dry-run")
    assert f"{len(study_cells('digits', 1))} trials from " in text and "runs/digits" in text
    assert not Path("runs").exists()


def test_study_hands_everything_to_the_runner_and_the_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_module = pytest.importorskip("bitbook.study.run")
    report = pytest.importorskip("bitbook.study.report")
    from bitbook.study.grid import study_cells

    seen: dict[str, Any] = {}

    def run_study(cells: list, trial: str, storage: object, **options: object) -> list:
        seen.update(cells=cells, trial=trial, storage=storage, starts=os.environ["BITBOOK_STARTS"], **options)
        return [result(cell, size) for size, cell in enumerate(cells[:4], start=1000)]

    def result(cell: dict, size: int) -> dict:
        rows = [{"split": split, "accuracy": 90.0, "loss": 0.5} for split in ("test", "validation")]
        seconds = {"start": 1.0, "fit": 1.0, "evaluate": 1.0}
        found = {"bytes": size, "rows": rows, "ledger": {"bits_per_weight": 3.0}, "seconds": seconds}
        return {"cell_id": str(size), "cell": cell, "result": found}

    def write_all(results: list, out: Path, *, command: str) -> list[Path]:
        seen.update(out=out, command=command)
        return [out / "report.html"]

    monkeypatch.setenv("BITBOOK_STARTS", "")
    monkeypatch.setattr(run_module, "run_study", run_study)
    monkeypatch.setattr(report, "write_all", write_all)
    secret = "postgresql://me:secret@host/db"
    arguments = ["study", "--dataset", "digits", "--out", "o", "--seeds", 1]
    text = run(*arguments, "--workers", 2, "--storage", secret, "--keep-going")
    assert "float, float32" in text and " 1,001 " in text and f"4 of {len(seen['cells'])} trials" in text
    assert str(Path("o", "report.html")) in text and "secret" not in text
    assert seen["cells"] == study_cells("digits", 1) and seen["trial"] == "bitbook.study.trial:run_trial"
    assert seen["workers"] == 2 and seen["keep_going"] and seen["storage"] == secret
    assert seen["starts"] == str(folder / "o" / "starts") and seen["out"] == Path("o")
    assert seen["command"] == "bitbook study --dataset digits --out o --seeds 1"
    run(*arguments)
    assert seen["storage"] == Path("o", "study.db")


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(bitbook.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", "import sys; from bitbook.cli import main; sys.exit(main())", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": source, "COLUMNS": "60"},
        capture_output=True,
        text=True,
    )


def test_in_a_process_of_its_own(folder: Path) -> None:
    """Exit codes reach the shell, the current folder is importable, and a pipe does not narrow tables."""
    options = ["--model", "mine:Tied", "--recipe", "Uniform(4)", "-o", "small.safetensors"]
    done = shell(folder, "compress", *options)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "a.weight" in line)
    assert "Uniform(4)" in row and "6 × 6" in row
    failed = shell(folder, "inspect", "mine.py")
    assert failed.returncode == MISTAKE and failed.stdout == ""
    assert failed.stderr.startswith("error: mine.py: ") and failed.stderr.count("\n") == 1


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bitbook {bitbook.__version__}\n"
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f" {command} " in text for command in COMMANDS)


def test_rd_measures_once_and_reports(trained: tuple[nn.Module, Path], folder: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--samples", 8000, "--source", "Laplace", "--bits", 1, "--bits", 2, "--out", "o"]
    methods = ["--method", "Lloyd", "--method", "ECSQ"]
    weights = ["--weights", trained[1], "--tensor", "fc1.weight"]
    text = run("rd", *options, *methods, *weights)
    table = Path("o", "rd.csv").read_text().splitlines()
    assert table[0].startswith("source,method,bits,mse,bytes,samples,seconds")
    assert {line.split(",")[0] for line in table[1:]} == {"Laplace", "fc1.weight"}
    assert "Laplace: ECSQ, " in text and "rd.svg" in text
    document = Path("o", "rd.md").read_text()
    assert "## fc1.weight" in document and "| ECSQ |" in document and Path("o", "rd.svg").stat().st_size > 5000
    again = run("rd", *options, *methods, *weights)
    assert "ECSQ, " not in again and Path("o", "rd.csv").read_text().splitlines() == table
    assert Path("o", "rd.md").read_text() == document


def test_explain_reads_every_kind_of_weights(trained: tuple[nn.Module, Path], folder: Path) -> None:
    model, weights = trained
    save_file({name: w.contiguous() for name, w in model.state_dict().items()}, "plain.safetensors")
    bitbook.save(bitbook.compress(model, bitbook.Plan({"*.weight": bitbook.Float()})), "small.safetensors")
    first = run_json("explain", weights)
    assert [g["name"] for g in first["tensors"]] == ["fc1.weight"]  # of 1,000 weights or more
    for other in ("plain.safetensors", "small.safetensors"):
        assert run_json("explain", other)["tensors"] == first["tensors"]
    (found,) = first["tensors"]
    assert found["weights"] == 1024 and found["vectors"] == pytest.approx(
        found["memory"] + found["shape"] + found["space_filling"]
    )
    assert found["bits"] == 2 and len(found["advice"]) == 4


def test_explain_says_and_draws(trained: tuple[nn.Module, Path], folder: Path) -> None:
    pytest.importorskip("matplotlib")
    text = run("explain", trained[1], "--bits", 1, "--picture", "gains.svg")
    assert (
        "fc1.weight, the largest:" in text
        and "Left out" not in text
        and "16 × 64" in text
        and "dB over fixed-rate scalars" in text
    )
    assert "entropy coding" in Path("gains.svg").read_text()
    assert "fewer than 1,000 weights: fc1.bias" in run("explain", trained[1], "--tensor", "fc1.*")


def test_a_budget_gives_a_file_within_it(trained: tuple[nn.Module, Path], folder: Path) -> None:
    options = ["--budget", "0.7KB", "--epochs", 12, "--batch", 32, "--data", "digits", "--distill"]
    said = run_json("compress", "--model", MODEL, "--weights", trained[1], *options, "-o", "small.safetensors")
    assert said["bytes"] == (folder / "small.safetensors").stat().st_size <= 700
    assert said["accuracy"]["test"]["after"] > 85
    assert all("ECSQ" in tensor["stored_as"] for tensor in said["tensors"] if tensor["tensor"] != "header")


def test_public_networks_bring_their_weights(
    stories: Dataset, pretrained_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A language model, without --weights, calibrated on stories and measured on them."""
    few = dataclasses.replace(
        stories,
        train_x=stories.train_x[:4, :50],
        train_y=stories.train_y[:4, :50],
        test_x=stories.test_x[:4],
        test_y=stories.test_y[:4],
    )
    monkeypatch.setitem(DATASETS, "stories", lambda: few)
    options = ("--model", "stories260k", "--data", "stories", "--layers", "layers.*.w?.weight")
    said = run_json("compress", *options, "--recipe", "Uniform(6)", "--calibrate", "4", "-o", folder / "s.safetensors")
    assert said["aliases"] == {"output.weight": "tok_embeddings.weight"}
    found = run_json("evaluate", folder / "s.safetensors", "--model", "stories260k", "--data", "stories")
    assert found["accuracy"] == said["accuracy"]["test"]["after"] > 50
    assert 1 < found["loss"] < 2
