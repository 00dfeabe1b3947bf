"""The file: quantized and dense tensors in one safetensors-compatible file, every byte accounted for."""

from bitbook.artifact.artifact import Artifact as Artifact
from bitbook.artifact.artifact import QuantizedInput as QuantizedInput
from bitbook.artifact.ledger import Ledger as Ledger
from bitbook.artifact.ledger import Row as Row
from bitbook.artifact.read import from_bytes as from_bytes
from bitbook.artifact.read import read as read
from bitbook.artifact.read import read_ledger as read_ledger
from bitbook.artifact.write import Layout as Layout
from bitbook.artifact.write import save as save
from bitbook.artifact.write import to_bytes as to_bytes
