"""Checkpoints without code: safetensors files of any size, tensor by tensor, in bounded memory.

checkpoint ─► jobs, one per tensor ─► parts on disk ─► file of format 1          (compress)
file ─► jobs, one per tensor ─► their places in a plain safetensors file         (decompress)
"""

from bitbook.checkpoints.compress import compress_checkpoint as compress_checkpoint
from bitbook.checkpoints.compress import plan_checkpoint as plan_checkpoint
from bitbook.checkpoints.decompress import decompress_checkpoint as decompress_checkpoint
from bitbook.checkpoints.engines import Engine as Engine
from bitbook.checkpoints.engines import Here as Here
from bitbook.checkpoints.engines import Processes as Processes
