from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitbook
from bitbook import ECSQ, Binary, Codebook, Float, Plan, Quantizer, Table, Ternary, Uniform
from bitbook.artifact.contents import CODERS
from bitbook.checkpoints import Engine, Here, Processes, compress_checkpoint, decompress_checkpoint, slabs
from bitbook.checkpoints import parts as parts_module
from bitbook.checkpoints.rate import Histogram, step_for
from bitbook.checkpoints.source import Stored, open_checkpoint
from bitbook.cli import MISTAKE, main
from bitbook.errors import CheckpointError, CorruptArtifact, PlanError, WeightError
from bitbook.quantizer import FitOptions, Quantized, quantize


def tensors(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(60, 100, generator=g),
        "b.weight": (torch.randn(8, 30, 20, generator=g) * torch.randn(8, 1, 1, generator=g).exp()).bfloat16(),
        "c.weight": torch.randn(1, 3000, generator=g).half(),
        "norm": torch.ones(100, dtype=torch.bfloat16),
        "steps": torch.arange(6).reshape(2, 3),
        "mask": torch.tensor([[True, False]]),
        "none": torch.zeros(0, 4),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    held = tensors()
    halves = {"m-1.safetensors": list(held)[:3], "m-2.safetensors": list(held)[3:]}
    for file, names in halves.items():
        save_file({name: held[name] for name in names}, folder / file)
    places = {name: file for file, names in halves.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text("{}")
    return folder


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# -- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("coder", ["Smallest", "Rans"])
@pytest.mark.parametrize("engine", [Here(), Processes(2)], ids=repr)
def test_bytes_are_those_of_save(source: Path, tmp_path: Path, coder: str, engine: Engine) -> None:
    scalar = {"a.*": Uniform(4, (1, 20), scale=Uniform(8)), "c.*": ECSQ(3), "norm": Float("float16")}
    plan = Plan({**scalar, "b.*": Codebook(9, (1, 4))})
    done = compress_checkpoint(source, tmp_path / "s.safetensors", plan=plan, coder=coder, engine=engine)
    held = tensors()
    recipes = plan.recipes(held)
    content: dict[str, Quantized | Tensor] = {
        name: w if (r := recipes[name]) is None else quantize(r, w, generator=torch.Generator().manual_seed(0))
        for name, w in held.items()
    }
    bitbook.save(bitbook.Artifact(content), tmp_path / "other", CODERS[coder], "per-tensor")
    assert (tmp_path / "s.safetensors").read_bytes() == (tmp_path / "other").read_bytes()
    assert done.bytes == sum(row.bytes for row in done.rows) == (tmp_path / "s.safetensors").stat().st_size
    number = "no floating-point numbers"
    assert {row.tensor: row.dense for row in done.rows if row.dense} == dict(steps=number, mask=number, none="empty")
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("bits", [0.7, 2, 2.5, 4])
def test_bits_are_kept_and_reading_again_and_saving_gives_the_same_file(
    source: Path, tmp_path: Path, bits: float
) -> None:
    small = tmp_path / "s.safetensors"
    done = compress_checkpoint(source, small, bits=bits, coder="Rans")
    assert 0.99 * bits <= done.bits <= 1.005 * bits
    whys = {row.tensor: row.dense for row in done.rows}
    assert whys["norm"] == "fewer than two axes" and whys["a.weight"] is None
    again = bitbook.read(small)
    bitbook.save(again, tmp_path / "again", CODERS["Rans"], "per-tensor")
    assert small.read_bytes() == (tmp_path / "again").read_bytes()
    for row in done.rows:
        if row.relative_error is not None:
            w = tensors()[row.tensor].float()
            error = (w - again.decode(row.tensor)).double().square().sum() / w.double().square().sum()
            assert row.relative_error == pytest.approx(float(error), rel=1e-4)


def test_shards_come_back_as_shards_with_their_types(shards: Path, tmp_path: Path) -> None:
    small, plain = tmp_path / "small", tmp_path / "plain"
    done = compress_checkpoint(shards, small, bits=3)
    assert done.beside == ["config.json"]
    assert {p.name for p in small.iterdir()} == {"m-1.safetensors", "m-2.safetensors", "model.safetensors.index.json"}
    assert done.bytes == sum(p.stat().st_size for p in small.iterdir())
    decompress_checkpoint(small, plain)
    held = tensors()
    found = {name: w for path in plain.glob("*.safetensors") for name, w in load_file(path).items()}
    assert {n: (w.dtype, w.shape) for n, w in found.items()} == {n: (w.dtype, w.shape) for n, w in held.items()}
    assert all(same(found[name], held[name]) for name in ("norm", "steps", "mask", "none"))
    open_checkpoint(plain)  # index and shards agree
    again = tmp_path / "again"
    decompress_checkpoint(small, again, dtype="float32", engine=Processes(2))
    floats = load_file(again / "m-1.safetensors")
    assert all(w.dtype == torch.float32 for w in floats.values())
    assert torch.equal(floats["b.weight"].bfloat16(), found["b.weight"])


def test_a_file_decompresses_like_its_artifact(source: Path, tmp_path: Path) -> None:
    small, plain = tmp_path / "s.safetensors", tmp_path / "p.safetensors"
    compress_checkpoint(source, small, bits=3)
    decompress_checkpoint(small, plain)
    want, found = bitbook.read(small).state_dict(), load_file(plain)
    assert want.keys() == found.keys() and all(same(want[name], found[name]) for name in want)
    decompress_checkpoint(small, plain, dtype="bfloat16")
    assert same(load_file(plain)["a.weight"], want["a.weight"].bfloat16())


@pytest.mark.parametrize("layout", ["one", "per-tensor"])
def test_tied_names_get_a_copy_each(tmp_path: Path, layout: bitbook.artifact.Layout) -> None:
    w = quantize(Uniform(4), torch.randn(4, 6))
    artifact = bitbook.Artifact({"w": w, "b": torch.ones(3)}, aliases={"v": "w"})
    bitbook.save(artifact, tmp_path / "s", layout=layout)
    assert decompress_checkpoint(tmp_path / "s", tmp_path / "p.safetensors").tensors == 3
    found = load_file(tmp_path / "p.safetensors")
    assert torch.equal(found["v"], w.decode()) and torch.equal(found["w"], found["v"])


def test_what_does_not_fit_into_a_type_is_refused(tmp_path: Path) -> None:
    bitbook.save(bitbook.Artifact({"w": quantize(Uniform(4), torch.tensor([[-1e6, 1e6]]))}), tmp_path / "s")
    with pytest.raises(PlanError, match=r"w: [0-9.e+]+ does not fit into float16"):
        decompress_checkpoint(tmp_path / "s", tmp_path / "p.safetensors", dtype="float16")
    assert not (tmp_path / "p.safetensors").exists()


# -- slabs and rates ---------------------------------------------------------------------------

RECIPES = (
    *(ECSQ(), ECSQ(2), ECSQ(1, (1, -1)), ECSQ(1, (-1, 1)), ECSQ(1, (2, 5))),
    *(Uniform(4), Uniform(3, (1, 5), symmetric=False), Uniform(4, (2, -1)), Uniform(4, (3, 4), pad=True)),
    *(Binary((1, -1)), Ternary(), Table(bitbook.NF4, (1, 4)), bitbook.PowersOfTwo(4), Float("bfloat16")),
)


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@pytest.mark.parametrize("size", [1, 60, 10**6])
def test_slabs_are_the_whole(recipe: Quantizer, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "ELEMENTS", size)
    w = torch.randn(14, 20)
    save_file({"w": w}, tmp_path / "m.safetensors")
    (stored,) = open_checkpoint(tmp_path / "m.safetensors").tensors
    cuts = slabs.slabs(recipe, (14, 20))
    assert cuts is not None and [c.start for c in cuts[1:]] == [c.stop for c in cuts[:-1]] and cuts[-1].stop == 280
    found, whole = slabs.encode(stored, recipe, FitOptions(), 0), quantize(recipe, w)
    assert found.quantized.recipe == whole.recipe
    for one, other in zip(found.quantized.streams(), whole.streams(), strict=True):
        assert one.spec == other.spec and torch.equal(one.codes, other.codes)
    values = torch.cat([values for _, values in slabs.decode(whole)])
    assert torch.equal(values.reshape(14, 20), whole.decode())
    assert found.error == pytest.approx(float((w - whole.decode()).double().square().sum()), rel=1e-5, abs=1e-9)


@given(st.floats(0.1, 9), st.sampled_from(["normal", "heavy", "few"]), st.integers(0, 99))
def test_the_step_is_the_finest_within_the_bits(bits: float, kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(4000, generator=g)
    w = {"normal": w, "heavy": w / torch.rand(4000, generator=g), "few": w.round()}[kind].bfloat16()
    patterns = torch.bincount(w.view(torch.int16).long() & 0xFFFF, minlength=1 << 16)
    histogram = Histogram(patterns.numpy())
    step = step_for(histogram, bits)
    codes = quantize(ECSQ(), w, options=FitOptions(step=step)).codes["codes"]
    counts = torch.unique(codes, return_counts=True)[1].double()
    entropy = float(-(counts * (counts / 4000).log2()).sum() / 4000)
    assert histogram.bits(step)[0] == pytest.approx(entropy + 16 * len(counts) / 4000)
    assert histogram.bits(step)[0] <= bits or len(counts) == 1


# -- interruptions -----------------------------------------------------------------------------


def test_finished_tensors_are_not_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, small = tmp_path / "whole.safetensors", tmp_path / "s.safetensors"
    compress_checkpoint(source, whole, bits=3)
    made: list[str] = []
    make = parts_module.make

    def failing(job: parts_module.Job) -> str:
        if len(made) == 2:
            raise OSError(28, "No space left on device")
        made.append(make(job))
        return made[-1]

    monkeypatch.setattr(parts_module, "make", failing)
    with pytest.raises(CheckpointError, match="no room left on the disk; make some and run the command again"):
        compress_checkpoint(source, small, bits=3)
    folder = tmp_path / "s.safetensors.parts"
    assert not small.exists() and len(list(folder.glob("*.part"))) == 2
    with pytest.raises(CheckpointError, match="parts of other work: the recipe or bits changed"):
        compress_checkpoint(source, small, bits=4)
    first = min(folder.glob("*.part"))
    first.write_bytes(first.read_bytes()[:-1] + b"!")  # damaged: to be made again
    monkeypatch.setattr(parts_module, "make", make)
    assert compress_checkpoint(source, small, bits=3).reused == 1
    assert small.read_bytes() == whole.read_bytes() and not folder.exists()


def test_a_changed_source_refuses_old_parts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitbook.checkpoints.compress._assemble", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress_checkpoint(source, tmp_path / "s.safetensors", bits=3)
    save_file(tensors(1), source)
    with pytest.raises(CheckpointError, match="the source changed since; remove the folder"):
        compress_checkpoint(source, tmp_path / "s.safetensors", bits=3)


def test_a_folder_that_was_published_is_finished(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = parts_module.remove_folder
    monkeypatch.setattr(parts_module, "remove_folder", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress_checkpoint(shards, tmp_path / "small", bits=3)
    monkeypatch.setattr(parts_module, "remove_folder", remove)
    done = compress_checkpoint(shards, tmp_path / "small", bits=3)
    assert done.reused == 3 and not (tmp_path / "small.parts").exists()
    with pytest.raises(CheckpointError, match="small exists; remove it"):
        compress_checkpoint(shards, tmp_path / "small", bits=3)


def test_killed_at_any_time_the_same_command_goes_on(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    source, whole, small = (tmp_path / name for name in ("m.safetensors", "whole.safetensors", "s.safetensors"))
    g = torch.Generator().manual_seed(0)
    save_file({f"{i}": torch.randn(300, 300, generator=g) for i in range(12)}, source)
    compress_checkpoint(source, whole, bits=3, coder="Rans")
    code = (
        "import sys, bitbook.checkpoints as c\n"
        "engine = c.Processes(2) if sys.argv[3] == '2' else c.Here()\n"
        "c.compress_checkpoint(sys.argv[1], sys.argv[2], bits=3, coder='Rans', engine=engine)"
    )
    for wait, workers in ((1, 1), (4, 2)):  # parts
        command = [sys.executable, "-c", code, str(source), str(small), str(workers)]
        with subprocess.Popen(command, env=_environment()) as process:
            while process.poll() is None and len(list(tmp_path.glob("s.safetensors.parts/*.part"))) < wait:
                time.sleep(0.002)
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(signal.SIGKILL)
        assert not psutil.wait_procs(children, timeout=30)[1]  # workers end with it
    compress_checkpoint(source, small, bits=3, coder="Rans")
    assert small.read_bytes() == whole.read_bytes()


def _die(_: int) -> int:
    os._exit(9)


def test_a_worker_that_dies_is_said() -> None:
    with pytest.raises(CheckpointError, match="a worker process died, perhaps for lack of memory; the same command"):
        list(Processes(2).run(_die, [1, 2], [1, 1], 10))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(bitbook.__file__).parents[1])}


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Three times the largest tensor as float32 and 300 MB, above the process after the import."""
    pytest.importorskip("psutil")
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc; getrusage would count the parent's before exec")
    w = torch.randn(4000, 8000, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": w}, tmp_path / "m.safetensors")
    code = (
        "import pathlib, psutil, bitbook\n"
        "base = psutil.Process().memory_info().rss\n"
        "from bitbook.checkpoints import *\n"
        "compress_checkpoint('m.safetensors', 's.safetensors', bits=3, engine=Here())\n"
        "decompress_checkpoint('s.safetensors', 'p.safetensors', dtype='bfloat16', engine=Here())\n"
        "status = dict(line.split(':', 1) for line in pathlib.Path('/proc/self/status').read_text().splitlines())\n"
        "print(1024 * int(status['VmHWM'].split()[0]) - base)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 3 * 4 * 32_000_000 + 300_000_000


# -- what is refused ---------------------------------------------------------------------------


def forged(path: Path, header: object, data: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(start: int, stop: int, dtype: str = "F32", shape: tuple[int, ...] = (2, 2)) -> dict[str, object]:
    return {"data_offsets": [start, stop], "dtype": dtype, "shape": list(shape)}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"{", 0, "not JSON"),
        (b'{"a":1,"a":2}', 0, "key twice"),
        ([], 0, "not a JSON object"),
        ({"a": entry(0, 16)}, 15, "said to be at"),
        ({"a": entry(0, 12)}, 12, "16 bytes of F32"),
        ({"a": entry(-4, 12)}, 16, "said to be at"),
        ({"a": {**entry(0, 16), "more": 1}}, 16, "and no others"),
        ({"a": entry(0, 16, "F31")}, 16, "'F31' is none of"),
        ({"a": entry(0, 16, shape=(-1, -4))}, 16, "not a shape"),
        ({"a": {**entry(0, 16), "data_offsets": [0, 16.0]}}, 16, "said to be at"),
        ({"a": entry(0, 16), "b": entry(8, 24)}, 24, "b: its data overlaps"),
        ({"a": entry(0, 16), "b": entry(20, 36)}, 36, "b: its data leaves a hole"),
        ({"a": entry(0, 16)}, 17, "1 bytes of data belong to no tensor"),
        ({"__metadata__": {"a": 1}}, 0, "texts to texts"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, data: int, reason: str) -> None:
    path = forged(tmp_path / "m.safetensors", header, data)
    with pytest.raises(CorruptArtifact, match=f"m.safetensors: .*{reason}"):
        compress_checkpoint(path, tmp_path / "s.safetensors", bits=3)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_lengths_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for data, reason in ((b"", "too short"), (b"\xff" * 8, "the header claims"), (b"\x09" + bytes(15), "claims 9")):
        path.write_bytes(data)
        with pytest.raises(CorruptArtifact, match=reason):
            open_checkpoint(path)


def test_what_cannot_be_stored_is_a_mistake_not_damage(source: Path, tmp_path: Path) -> None:
    path = forged(tmp_path / "f8.safetensors", {"a": entry(0, 4, "F8_E4M3")}, 4)
    with pytest.raises(PlanError, match="f8.safetensors: a: its type F8_E4M3 cannot be stored"):
        open_checkpoint(path)
    compress_checkpoint(source, tmp_path / "s.safetensors", bits=3)
    with pytest.raises(PlanError, match="compressed already"):
        compress_checkpoint(tmp_path / "s.safetensors", tmp_path / "t.safetensors", bits=3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm": "gone.safetensors"}, "names the shard gone.safetensors, which is not there"),
        ({"norm": "m-1.safetensors"}, "m-1.safetensors: the index says that norm is in it"),
        ({"norm": None}, "holds norm, which the index does not name"),
        ({"new": "m-2.safetensors"}, "the index says that new is in it"),
        ({"norm": "../m-2.safetensors"}, "no *.safetensors beside the index"),
        ({"norm": "/m-2.safetensors"}, "no *.safetensors beside the index"),
        ({"norm": "config.json"}, "no *.safetensors beside the index"),
        ({"norm": 3}, "no *.safetensors beside the index"),
    ],
)
def test_indices_that_lie(shards: Path, tmp_path: Path, change: dict[str, object], reason: str) -> None:
    index = shards / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    whole["weight_map"] = {n: f for n, f in {**whole["weight_map"], **change}.items() if f is not None}
    index.write_text(json.dumps(whole))
    with pytest.raises(CorruptArtifact) as caught:
        compress_checkpoint(shards, tmp_path / "small", bits=3)
    assert reason in str(caught.value) and not (tmp_path / "small").exists()


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    held = load_file(shards / "m-2.safetensors")
    save_file({**held, "a.weight": torch.ones(2)}, shards / "m-2.safetensors")
    with pytest.raises(CorruptArtifact, match="holds a.weight, which the index has in m-1.safetensors"):
        open_checkpoint(shards)


def test_a_folder_needs_one_index(shards: Path) -> None:
    (shards / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match="has 2 of them"):
        open_checkpoint(shards)
    for path in shards.glob("*.json"):
        path.unlink()
    with pytest.raises(CorruptArtifact, match="has none"):
        open_checkpoint(shards)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"bits": 3}, {"plan": Uniform(4)}, {"plan": Codebook(4)}], ids=str)
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, options: dict) -> None:
    w = torch.randn(4, 8)
    w[1, 2] = value
    save_file({"good": torch.randn(4, 8), "bad": w}, tmp_path / "m.safetensors")
    with pytest.raises(WeightError, match="bad: element 10 is (nan|inf)"):
        compress_checkpoint(tmp_path / "m.safetensors", tmp_path / "s.safetensors", **options)


def test_booleans_that_are_neither_are_refused(tmp_path: Path) -> None:
    path = forged(tmp_path / "m.safetensors", {"m": entry(0, 2, "BOOL", (2,))}, 2)
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with pytest.raises(CorruptArtifact, match="m: a boolean is neither 0 nor 1"):
        compress_checkpoint(path, tmp_path / "s.safetensors", plan=Plan())


def test_outputs_in_the_way(source: Path, shards: Path, tmp_path: Path) -> None:
    for path, output, reason in (
        (source, source, "is an input"),
        (shards, shards, "is an input"),
        (source, shards, "is a folder; name a file"),
        (source, tmp_path / "no" / "s.safetensors", "there is no folder"),
    ):
        with pytest.raises(PlanError, match=reason):
            compress_checkpoint(path, output, bits=3)
    (tmp_path / "s.safetensors.parts").mkdir()
    (tmp_path / "s.safetensors.parts" / "mine").touch()
    with pytest.raises(CheckpointError, match="is in the way and not bitbook's"):
        compress_checkpoint(source, tmp_path / "s.safetensors", bits=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "pass one of --bits, --recipe and --plan"),
        ("--bits 3 --recipe Uniform(4)", "pass one of --bits, --recipe and --plan"),
        ("--bits 0", "use a number from 0.05 to 16"),
        ("--bits 3 --layers conv*", "'conv*' names no tensor"),
        ("--bits 3 --model lenet-5 --epochs 3", "--model: a checkpoint is compressed without its model"),
        ("--recipe Uniform(4,(1,7))", "a.weight: 100 columns do not divide"),
        ("--bits 3 --workers 2 --scheduler tcp://h:1", "--workers are of this machine"),
    ],
)
def test_a_mistake_is_one_clear_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    pytest.importorskip("distributed", reason="distributed is not installed") if "scheduler" in options else None
    assert main(["compress", str(source), *options.split(), "-o", str(tmp_path / "s.safetensors")]) == MISTAKE
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and words in error and error.count("\n") == 1


def test_from_the_command_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, plain = str(tmp_path / "small"), str(tmp_path / "plain")
    assert main(["compress", str(shards), "--bits", "3", "--workers", "1", "-o", small]) == 0
    out, error = capsys.readouterr()
    assert "not copied: config.json" in out and "dense: fewer than two axes" in out and error == ""
    assert "bits per quantized weight" in out
    assert main(["decompress", small, "-o", plain]) == 0
    assert "7 tensors" in capsys.readouterr().out
    one = str(tmp_path / "one.safetensors")
    given = ["compress", str(shards / "m-1.safetensors"), "--recipe", "Uniform(4)", "--layers", "a.*", "--json"]
    assert main([*given, "-o", one]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == os.path.getsize(one) == sum(row["bytes"] for row in said["tensors"])
    assert {row["tensor"]: row["dense"] for row in said["tensors"]}["b.weight"] == "no pattern names it"


def test_stored_tensors_are_read_in_pieces(source: Path) -> None:
    held = tensors()
    for stored in open_checkpoint(source).tensors:
        assert isinstance(stored, Stored)
        if stored.numel:
            found = torch.cat([stored.values(i, i + 1) for i in range(stored.numel)])
            assert same(found.reshape(stored.shape), held[stored.name])
