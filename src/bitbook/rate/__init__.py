"""The price of bits: what codes would cost, and training that pays for them."""
