"""What scripts rely on: exit codes, JSON, dry runs, completion, and that Ctrl-C loses nothing without a word."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bitbook
from bitbook.cli import app, codes, main
from bitbook.models import build_model

MODEL = "mlp-64-16-10"
RECIPE = ("--recipe", "Codebook(32, (1, 4), centroids=Uniform(5))")


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(dict(build_model(MODEL, seed=0).state_dict()), "w.safetensors")
    return tmp_path / "w.safetensors"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=refuse)


@pytest.mark.parametrize("command", ["study", "compress", "decompress", "inspect", "diff", "evaluate", "rd", "explain"])
def test_every_command_that_prints_a_table_prints_json(command: str) -> None:
    (found,) = (
        known.callback for known in app.registered_commands if known.callback and known.callback.__name__ == command
    )
    assert "as_json" in found.__annotations__


# -- exit codes


def test_exit_codes_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for code in (codes.DIFFERENT, codes.MISTAKE, codes.MISSED, codes.INTERRUPTED):
        assert f" {code} " in said
    assert codes.EXPLAINED in said


def test_a_missed_budget_is_not_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from bitbook.budget import compress

    def missed(model: Any, data: Any, **options: Any) -> tuple[bitbook.Artifact, bitbook.Report]:
        artifact = bitbook.compress(model, bitbook.Plan({"*.weight": bitbook.Uniform(4)}))
        return artifact, bitbook.Report(**{
            **{field.name: 0 for field in dataclasses.fields(bitbook.Report)},
            "budget": 100, "size": 900, "reached": False, "choices": (), "dense": {}, "repairs": (),
        })  # fmt: skip

    monkeypatch.setattr(compress, "fit_budget", missed)
    given = ["compress", "--model", MODEL, "--weights", "w.safetensors", "--data", "digits", "--budget", "100"]
    assert main([*given, "-o", "small.safetensors"]) == codes.MISSED
    assert Path("small.safetensors").exists() and "900 is the smallest found" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(weights: Path) -> None:
    code = "import sys; from bitbook.cli import main; sys.exit(main(['inspect', 'small.safetensors', '--json']))"
    plan = bitbook.Plan({f"{i}.weight": bitbook.Uniform(4) for i in range(300)})
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(300)))
    bitbook.save(bitbook.compress(model, plan), "small.safetensors")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


# -- dry runs


def test_a_dry_run_says_exactly_what_is_written(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("compress", "--model", MODEL, *RECIPE, "-o", "small.safetensors")
    exact = run_json(capsys, *given, "--coder", "fixed", "--dry-run")
    most = run_json(capsys, *given, "--dry-run")
    assert not Path("small.safetensors").exists()
    assert exact["sizes"] == "exactly" and most["sizes"] == "at most"
    written = {
        coder: run_json(capsys, *given, "--weights", str(weights), "--coder", coder)["bytes"]
        for coder in ("fixed", "smallest")
    }
    assert exact["bytes"] == written["fixed"] == exact["fixed_width"] == most["fixed_width"]
    assert most["bytes"] >= written["fixed"] >= written["smallest"]
    sizes = {row["tensor"]: row["bytes"] for row in exact["tensors"]}
    assert sum(sizes.values()) == exact["bytes"] and sizes["fc1.weight"] > sizes["fc2.weight"]
    assert main([*given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"at most {most['bytes']:,} bytes (an upper bound, fixed width" in said and "Codebook(32" in said


def test_a_dry_run_of_a_checkpoint(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("compress", str(weights), "-o", "small.safetensors")
    exact = run_json(capsys, *given, *RECIPE, "--coder", "fixed", "--dry-run")
    assert exact["sizes"] == "exactly" and not Path("small.safetensors").exists()
    assert run_json(capsys, *given, *RECIPE, "--coder", "fixed")["bytes"] == exact["bytes"]
    most = run_json(capsys, *given, *RECIPE, "--dry-run")
    assert most["bytes"] > most["fixed_width"] == exact["bytes"] and most["sizes"] == "at most"
    assert run_json(capsys, *given, "--bits", "3", "--dry-run")["sizes"] == "about"
    assert main([*given, *RECIPE, "--dry-run"]) == 0
    assert "an upper bound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--budget", "4KB"), "--budget: a dry run needs a --recipe"),
        (("--recipe", "ECSQ()"), "fc1.weight: ECSQ() has codes without a bound"),
        (("--recipe", "Uniform(4, (1, 5))"), "fc1.weight: "),
        ((), "pass either --plan or --recipe"),
    ],
)
def test_what_a_dry_run_cannot_say(given: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "--model", MODEL, *given, "--dry-run", "-o", "o"]) == codes.MISTAKE
    assert words in capsys.readouterr().err


# -- other tables as JSON


def test_a_study_s_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    from bitbook.study.grid import study_cells

    found = run_json(capsys, "study", "--dataset", "digits", "--dry-run")
    assert found["trials"] == len(study_cells("digits")) == sum(m["trials"] for m in found["methods"])


def test_decompress_as_json(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bitbook.save(bitbook.compress(build_model(MODEL, seed=0), bitbook.Plan({"*": bitbook.Float()})), "s.safetensors")
    found = run_json(capsys, "decompress", "s.safetensors", "-o", "plain.safetensors")
    assert found["tensors"] == 4 and found["bytes"] == Path("plain.safetensors").stat().st_size


# -- Ctrl-C


def test_rd_goes_on_after_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from bitbook.study.rd import rd

    given = ["rd", "--samples", "8000", "--source", "Laplace", "--bits", "1", "--bits", "2", "--method", "Lloyd"]
    measure, calls = rd.measure, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(rd, "measure", interrupted)
    assert main([*given, "--out", "o"]) == codes.INTERRUPTED
    error = capsys.readouterr().err
    assert f"kept in {Path('o', 'rd.csv')}; the same command goes on from there" in error
    assert error.endswith("interrupted\n")
    assert len(Path("o", "rd.csv").read_text().splitlines()) == 2
    found = run_json(capsys, *given, "--out", "o")
    assert calls == 1 + len(found["points"]) > 2  # the first row was not measured again
    assert len(Path("o", "rd.csv").read_text().splitlines()) == calls


def test_a_checkpoint_goes_on_after_ctrl_c(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitbook.checkpoints import parts

    given = ("compress", str(weights), "--recipe", "Uniform(4)", "-o", "small.safetensors")
    make, calls = parts.make, 0

    def interrupted(job: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return make(job)

    monkeypatch.setattr(parts, "make", interrupted)
    assert main(list(given)) == codes.INTERRUPTED
    error = capsys.readouterr().err
    assert "kept in small.safetensors.parts; the same command goes on" in error and error.endswith("interrupted\n")
    assert not Path("small.safetensors").exists()
    assert run_json(capsys, *given)["reused"] == 1
    assert not Path("small.safetensors.parts").exists()


def test_a_model_begins_anew_after_ctrl_c(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitbook.apply.quantize_", interrupted)
    given = ["compress", "--model", MODEL, "--weights", str(weights), *RECIPE, "-o", "small.safetensors"]
    assert main(given) == codes.INTERRUPTED
    assert "small.safetensors was not written; the same command begins anew" in capsys.readouterr().err
    assert not Path("small.safetensors").exists()


# -- completion


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("bitbook de", {"decompress"}),
        ("bitbook study --dataset dig", {"digits"}),
        ("bitbook evaluate s --data cif", {"cifar10"}),
        ("bitbook compress --model mlp-64", {"mlp-64-32-16-10"}),
        ("bitbook compress --recipe Uni", {"Uniform("}),
        ("bitbook compress --coder f", {"fixed"}),
        ("bitbook compress --dry", {"--dry-run"}),
    ],
)
def test_the_shell_completes_names(
    words: str, found: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"_BITBOOK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main([])
    assert set(capsys.readouterr().out.split()) == found
