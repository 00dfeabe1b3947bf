"""Published weights: where they come from, what is checked, and what is said when something is wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import Server

from bitbook.errors import DataError
from bitbook.models import PRETRAINED_MODELS, build_model, pretrained_resnet8
from bitbook.models.pretrained import Weights, digest, load_weights

TENSORS = {"b": torch.tensor([1.0, -2.0]), "a.weight": torch.arange(6.0).reshape(2, 3)}
NET = Weights("net.safetensors", "the weights of a test", digest(TENSORS))


def test_the_digest_is_what_its_text_says() -> None:
    data = b"a.weight 2 3\n" + TENSORS["a.weight"].numpy().tobytes() + b"b 2\n" + TENSORS["b"].numpy().tobytes()
    assert digest(TENSORS) == hashlib.sha256(data).hexdigest()
    assert digest({**TENSORS, "a.weight": TENSORS["a.weight"].T}) != NET.sha256
    assert digest({"b": TENSORS["b"], "c.weight": TENSORS["a.weight"]}) != NET.sha256


def test_folders_in_their_order(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named folder, then BITBOOK_DATA, then the cache; a damaged file is not passed over for a later one."""
    cache, root = tmp_path / "cache" / "bitbook" / "models", tmp_path / "root"
    for folder in (cache, root / "models", tmp_path / "named"):
        folder.mkdir(parents=True)
        save_file(TENSORS, folder / NET.file)
    monkeypatch.setenv("BITBOOK_DATA", str(root))
    for folder, named in ((tmp_path / "named", tmp_path / "named"), (root / "models", None), (cache, None)):
        assert torch.equal(load_weights(NET, named)["a.weight"], TENSORS["a.weight"])
        good = (folder / NET.file).read_bytes()
        for bad, message in ((good[:-1] + b"\1", "SHA-256 of the tensors must be"), (good[:-1], "damaged safetensors")):
            (folder / NET.file).write_bytes(bad)
            with pytest.raises(DataError, match=f"{folder / NET.file}: {message} .*; get an intact copy"):
                load_weights(NET, named)
        (folder / NET.file).unlink()
    with pytest.raises(DataError, match="named/net.safetensors is missing: the weights of a test as safetensors"):
        load_weights(NET, tmp_path / "named")
    monkeypatch.setenv("BITBOOK_DATA", str(root / "nowhere"))
    with pytest.raises(DataError, match="nowhere, which is not a folder"):
        load_weights(NET)


def test_what_has_no_download_says_so(server: Server) -> None:
    with pytest.raises(DataError, match="Keras; set BITBOOK_DATA to a folder with models/resnet8_cifar10.safetensors"):
        pretrained_resnet8()


@pytest.mark.parametrize("name", PRETRAINED_MODELS)
def test_public_networks_by_name(name: str, pretrained_folder: Path) -> None:
    model, again = build_model(name, seed=0), build_model(name, seed=1)
    assert not model.training
    assert digest(model.state_dict()) == digest(again.state_dict())
