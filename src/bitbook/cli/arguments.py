"""What several commands' options are called, and what their texts stand for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitbook.cli.progress import progress
from bitbook.errors import DataError, ModelMismatch, PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitbook.data import Dataset, Split
    from bitbook.loop import Evaluation

InputFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file that bitbook wrote.")]
OutputPath = Annotated[Path, typer.Option("--output", "-o", help="The file to write; of shards, the folder.")]
MODEL_HELP = (
    "A built-in model (mlp-784-128-64-10, lenet-300-100, lenet-5, or mlp-A-B-… of any sizes), a public trained one "
    "(resnet-20-cifar10, resnet-44-cifar10, resnet-8-cifar10, stories260k), or package.module:callable of yours, which "
    "is called without arguments and returns an nn.Module."
)


def complete_model(incomplete: str) -> list[str]:
    """Names of models that begin so, for the shell."""
    from bitbook.models import MODELS, PRETRAINED_MODELS

    return _beginning(incomplete, (*MODELS, *PRETRAINED_MODELS))


def complete_data(incomplete: str) -> list[str]:
    """Names of data sets that begin so, for the shell."""
    from bitbook.data import DATASETS

    return _beginning(incomplete, DATASETS)


def complete_study(incomplete: str) -> list[str]:
    """Names of studies that begin so, for the shell."""
    from bitbook.study.catalogue import STUDIES

    return _beginning(incomplete, STUDIES)


def complete_recipe(incomplete: str) -> list[str]:
    """Names of quantizers that begin so, for the shell."""
    from bitbook.plan import KINDS

    return _beginning(incomplete, [f"{name}(" for name in KINDS])


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


Model = Annotated[str, typer.Option(help=MODEL_HELP, autocompletion=complete_model)]
DATA_HELP = (
    "digits, mnist, cifar10, stories, or package.module:callable of yours, which is called without arguments and "
    "returns a bitbook.data.Dataset. The model gets its examples as they are: rows of numbers."
)
Holdout = Annotated[
    int | None,
    typer.Option(min=0, help="How many training examples are held out for validation.", show_default="one in ten"),
]
Batch = Annotated[int, typer.Option(min=1, help="Examples per batch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TensorsFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Weights: .safetensors, .pt, or a file that bitbook wrote."),
]
Tensors = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor",
        help="With --weights: the tensors to look at, a pattern such as 'fc*.weight'; may be repeated.",
        show_default="all with two or more dimensions and 1,000 weights",
    ),
]
_LEAST_WEIGHTS = 1000


def chosen_tensors(path: Path, patterns: Sequence[str] | None) -> dict[str, Tensor]:
    """Tensors of a file by name; a file that bitbook wrote is decoded. Raises `PlanError` where none is meant."""
    from bitbook.checkpoints.weights import read_weights
    from bitbook.errors import AlreadyCompressed

    try:
        found = read_weights(path)
    except AlreadyCompressed:
        from bitbook.artifact import read

        found = read(path).state_dict()
    floats = {name: w for name, w in found.items() if w.is_floating_point() and w.numel()}
    if patterns:
        chosen = {name: w for name, w in floats.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    else:
        chosen = {name: w for name, w in floats.items() if w.dim() > 1 and w.numel() >= _LEAST_WEIGHTS}
    if not chosen:
        named = " or ".join(map(repr, patterns or ()))
        wanted = f"a name like {named}" if named else f"two dimensions and {_LEAST_WEIGHTS:,} weights"
        raise PlanError(f"{path}: no tensor has {wanted}; there are {', '.join(floats) or 'none'}")
    return chosen


def build(model: str) -> nn.Module:
    """The model that --model names; a built-in one has random weights, a public one its own."""
    from torch import nn

    from bitbook.importing import import_callable
    from bitbook.models import build_model

    if ":" not in model:
        return build_model(model, seed=0)
    _import_from_here()
    built = import_callable(model, PlanError)()
    if not isinstance(built, nn.Module):
        raise PlanError(f"{model} returned {type(built).__name__}; it must return an nn.Module")
    return built


def load_data(name: str, model: nn.Module) -> Dataset:
    """The data set that --data names, once it is known that the model takes its examples."""
    import torch

    from bitbook.data import load_dataset

    if ":" in name:
        _import_from_here()
    dataset = load_dataset(name)
    examples = dataset.test_x[:2]
    if len(examples) == 0:
        raise DataError(f"{name} has no test examples")
    try:
        with torch.no_grad():
            logits = model.eval()(examples)
    except Exception as error:  # whatever a foreign model makes of an input it does not expect
        raise ModelMismatch(
            f"the model does not take the examples of {name}, rows of {tuple(examples.shape[1:])}: {error}"
        ) from error
    expected = (*dataset.test_y[:2].shape, dataset.classes)
    if tuple(logits.shape) != expected:
        raise ModelMismatch(
            f"the model answers {len(examples)} examples with {tuple(logits.shape)} numbers; the "
            f"{dataset.classes} classes of {name} need {expected}"
        )
    return dataset


def held_out(dataset: Dataset, holdout: int | None) -> Split:
    """The training and validation parts that every command means by them."""
    from bitbook.data import split

    return split(dataset, len(dataset.train_x) // 10 if holdout is None else holdout)


def compared(
    models: Mapping[str, nn.Module], parts: Mapping[str, tuple[Tensor, Tensor]], *, batch: int = 64, shown: bool
) -> dict[str, dict[str, Evaluation]]:
    """How each model does on each part of the data, by the part's name and the model's, with a bar meanwhile."""
    from bitbook.loop import evaluate

    total = len(models) * sum(len(x) for x, _ in parts.values())
    with progress("examples", shown=shown) as update:
        done = 0

        def after_batch(examples: int) -> None:
            nonlocal done
            done += examples
            update("evaluating", done, total)

        return {
            part: {name: evaluate(model, x, y, batch=batch, after_batch=after_batch) for name, model in models.items()}
            for part, (x, y) in parts.items()
        }


def refuse(why: str, **options: object) -> None:
    """Raise `PlanError` for options that were given and have no use here, and say why they have none."""
    if given := [name for name, value in options.items() if value is not None]:
        raise PlanError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: {why}")


def check_output(output: Path, *inputs: Path | None) -> None:
    """Refuse an output that would overwrite an input, or that cannot be written, before any work is done."""
    for path in inputs:
        if path is not None and output.exists() and output.samefile(path):
            raise PlanError(f"{output} is an input of this command; write to another file")
    if output.is_dir():
        raise PlanError(f"{output} is a folder; name a file to write")
    if not output.parent.is_dir():
        raise PlanError(f"{output} cannot be written: there is no folder {output.parent}")


def _import_from_here() -> None:
    """Let modules of the current folder be imported, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
