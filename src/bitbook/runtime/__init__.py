"""Running from the packed form: codes stay in memory at their own width, and products are computed from them."""

from bitbook.runtime.layers import PackedEmbedding as PackedEmbedding
from bitbook.runtime.layers import PackedLinear as PackedLinear
from bitbook.runtime.restore import Residence as Residence
from bitbook.runtime.restore import load_packed as load_packed
from bitbook.runtime.restore import residence as residence
from bitbook.runtime.restore import restore_packed as restore_packed
