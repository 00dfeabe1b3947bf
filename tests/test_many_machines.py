"""The commands and manifests of docs/many-machines.md are what the shell, Kubernetes and bitbook take."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from bitbook.cli import app

yaml = pytest.importorskip("yaml")
PAGE = (Path(__file__).parents[1] / "docs" / "many-machines.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SCRIPTS = [text for kind, text in BLOCKS if kind in ("sh", "bash")]
MANIFESTS = [document for kind, text in BLOCKS if kind == "yaml" for document in yaml.safe_load_all(text)]
JOBS = {document["metadata"]["name"]: document["spec"] for document in MANIFESTS if document["kind"] == "Job"}
SBATCH = {"job-name", "array", "ntasks", "cpus-per-task", "mem", "time", "requeue", "output"}


def parsed(words):
    """What bitbook makes of a command line, without running it; fails for options that there are not."""
    name, *rest = words
    return typer.main.get_command(app).commands[name].make_context(name, rest).params


def pod(name):
    return JOBS[name]["template"]["spec"]


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_scripts_are_correct_shell(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_commands_are_those_of_bitbook():
    found = [line for script in SCRIPTS for line in script.splitlines() if re.match(r"(exec srun )?bitbook ", line)]
    assert len(found) == 3
    for line in found:
        options = parsed(shlex.split(line.removeprefix("exec srun "))[1:])
        assert options["dataset"] == "mnist"
        assert options["join"] != (options["workers"] == 1)


def test_the_batch_script_asks_for_what_slurm_knows():
    (script,) = (text for kind, text in BLOCKS if kind == "bash")
    first, *lines = script.splitlines()
    assert first == "#!/bin/bash"
    asked = dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups() for line in lines if "SBATCH" in line)
    assert asked.keys() == SBATCH and asked["array"] == "1-100"
    # Slurm reads directives up to the first command.
    assert [line.startswith("#SBATCH") for line in lines].index(False) == len(asked)


def test_manifests_are_jobs_of_workers_and_one_that_reports():
    assert all(document["apiVersion"] == {"Job": "batch/v1"}.get(document["kind"], "v1") for document in MANIFESTS)
    workers, report = JOBS["bitbook-workers"], JOBS["bitbook-report"]
    assert workers["parallelism"] == 100 and "completions" not in workers
    assert report.get("parallelism", 1) == 1
    (claim,) = (document["metadata"]["name"] for document in MANIFESTS if document["kind"] == "PersistentVolumeClaim")
    for name in JOBS:
        spec = pod(name)
        (container,) = spec["containers"]
        assert spec["restartPolicy"] == "OnFailure"  # a job takes no other but Never
        assert all(isinstance(word, str) for word in container["args"])
        assert parsed(container["args"])["join"] == (name == "bitbook-workers")
        (volume,) = spec["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment.keys() == {"BITBOOK_STORAGE", "BITBOOK_DATA"}
        secret = environment["BITBOOK_STORAGE"]["valueFrom"]["secretKeyRef"]
        assert f"secret generic {secret['name']} --from-file={secret['key']}=" in PAGE


def test_the_image_has_what_a_worker_needs():
    (recipe,) = (text for kind, text in BLOCKS if kind == "dockerfile")
    assert "[study,postgres]" in recipe and "constraints.txt" in recipe
