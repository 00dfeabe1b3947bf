"""Run the README line by line, from an empty folder in a fresh environment, and keep what happened with its times.

    python -m tests.readme_transcript --write docs/results/first-minutes.txt

A clone, a new virtual environment, then every line of the README's console blocks and every Python block in its order;
the Python blocks share one interpreter, as they would in a session. Ends with exit code 1 at the first line that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SKIPPED = {
    "make study": "sets up a second environment; what it runs follows below as 'bitbook study'",
    "make test": "the whole suite, and no part of the first minutes",
}
SHOWN = 4  # last lines of what a command prints
DRIVER = """
import json, sys, time
scope = {"__name__": "__main__"}
for line in sys.stdin:
    began, used = time.perf_counter(), time.process_time()
    try:
        exec(compile(json.loads(line), "README.md", "exec"), scope)
        word = "done"
    except BaseException as error:
        word = "failed"
        print(f"{type(error).__name__}: {error}")
    print(f"\\0{word}", time.perf_counter() - began, time.process_time() - used, flush=True)
"""
TORCH = "pip install torch"


def blocks(readme: str) -> Iterator[tuple[str, str]]:
    """Everything to run in order: ("python", block) and ("console", line)."""
    for kind, block in re.findall(r"```(python|console)\n(.*?)```", readme, re.DOTALL):
        if kind == "python":
            yield kind, block
        else:
            for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
                command = line.partition("    #")[0].strip()
                yield from ((kind, part.strip()) for part in command.split("&&"))


class Times(NamedTuple):
    """Seconds that one waits, and seconds of the processor, which do not depend on what else runs."""

    waited: float
    processor: float

    @classmethod
    def now(cls) -> Times:
        """Of this process's children that have ended, by the processor."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.perf_counter(), used.ru_utime + used.ru_stime)

    def since(self, before: Times) -> Times:
        return Times(self.waited - before.waited, self.processor - before.processor)

    def __str__(self) -> str:
        return f"{self.waited:.0f} s, of which {self.processor:.0f} s of one processor"


class Transcript:
    """Lines with times; `total` is what a newcomer waits for, without torch's download."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.total = Times(0.0, 0.0)

    def add(self, took: Times, text: str, output: str = "", *, counted: bool = True) -> None:
        if counted:
            self.total = Times(self.total.waited + took.waited, self.total.processor + took.processor)
        first, *rest = text.rstrip().splitlines()
        self.say(f"[{took.waited:6.1f} s, processor {took.processor:6.1f} s] {first}")
        for line in rest:
            self.say(f"{'':31}{line}")
        for line in output.rstrip().splitlines()[-SHOWN:]:
            self.say(f"{'':31}| {line.rstrip()[:150]}")

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)


def reuse_torch(packages: Path, folder: Path) -> None:
    """Let the new environment see the torch of this one, and what torch itself needs: links, and no other package."""
    folder.mkdir()
    wanted, seen = ["torch"], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        for path in {Path(str(file)).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            place = Path(str(found.locate_file(path)))
            if place.exists() and not (folder / path).exists():
                (folder / path).symlink_to(place)
        needs = [need for need in found.requires or () if "extra ==" not in need and "platform_system" not in need]
        wanted += [re.split(r"[^\w.-]", need)[0] for need in needs]
    (packages / "torch.pth").write_text(f"{folder}\n")


def run(folder: Path, readme: str, *, install_torch: bool, study: bool) -> Transcript:
    """Everything; raises SystemExit where a line fails, after it was said."""
    said = Transcript()
    environment = folder / "environment"
    variables = {n: v for n, v in os.environ.items() if n != "VIRTUAL_ENV" and not n.startswith("PYTHON")}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"

    def shell(command: str, cwd: Path, *, counted: bool = True) -> None:
        began = Times.now()
        done = subprocess.run(command, shell=True, cwd=cwd, env=variables, capture_output=True, text=True)
        shown = command.replace(sys.executable, "python").replace(str(ROOT), "…/bitbook")
        said.add(Times.now().since(began), f"$ {shown}", done.stdout.replace(str(folder), "…"), counted=counted)
        if done.returncode:
            raise SystemExit(f"{command} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")

    shell(f"git clone -q {ROOT} bitbook", folder)
    shell(f"{sys.executable} -m venv environment", folder)
    if not install_torch:
        (packages,) = environment.glob("lib/*/site-packages")
        reuse_torch(packages, folder / "torch")
    own = folder / "own"
    own.mkdir()
    session: subprocess.Popen[str] | None = None
    compressed = False
    try:
        for kind, text in blocks(readme):
            if kind == "console":
                if text in SKIPPED or (text.startswith("bitbook study") and not study):
                    said.say(f"{'[skipped]':31}$ {text}: {SKIPPED.get(text, 'left out with --no-study')}")
                elif text.startswith(TORCH) and not install_torch:
                    said.say(f"{'[skipped]':31}$ {text}: one that is installed already is used")
                else:
                    clone = text.startswith(("pip", "make"))
                    shell(text, folder / "bitbook" if clone else own, counted=not text.startswith(TORCH))
                continue
            session = session or subprocess.Popen(
                ["python", "-c", DRIVER], cwd=own, env=variables, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            output, took, ok = ask(session, text)
            said.add(took, "\n".join(f">>> {line}" for line in text.splitlines()), output)
            if not ok:
                raise SystemExit(f"a Python block failed:\n{output}")
            if not compressed:
                compressed = True
                said.say(f"--- a model of one's own is compressed after {said.total}, beside torch's download")
    finally:
        if session is not None and session.stdin is not None:
            session.stdin.close()
            session.wait()
    said.say(f"--- all of the README after {said.total}")
    return said


def ask(session: subprocess.Popen[str], code: str) -> tuple[str, Times, bool]:
    """What a block prints in the session, its times, and whether it went well."""
    assert session.stdin is not None and session.stdout is not None
    session.stdin.write(json.dumps(code) + "\n")
    session.stdin.flush()
    output = ""
    for line in session.stdout:
        if line.startswith("\0"):
            word, *seconds = line[1:].split()
            return output, Times(*map(float, seconds)), word == "done"
        output += line
    return output, Times(0.0, 0.0), False


def main() -> None:
    """Run, and write the transcript."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, default=None, help="where the transcript goes")
    parser.add_argument("--install-torch", action="store_true", help="download torch, too, instead of using this one's")
    parser.add_argument("--no-study", action="store_true", help="leave the study on digits out")
    given = parser.parse_args()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        said = run(Path(folder).resolve(), readme, install_torch=given.install_torch, study=not given.no_study)
    if given.write is not None:
        command = "python -m tests.readme_transcript --write docs/results/first-minutes.txt"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        others = f"{load:.0f} other processes wanted them when it began" if load >= 1 else "free when it began"
        head = f"# {command}\n# {cores} cores, {others}\n\n"
        given.write.write_text(head + "\n".join(said.lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
