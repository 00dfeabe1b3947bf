"""Ways to where users already are; each module needs an extra of its own and is imported on use.

artifact ─► huggingface ─► a model that `save_pretrained` and `from_pretrained` know
         ─► onnx        ─► a file that any ONNX runtime computes from
plan     ─► torchao     ─► `torchao.quantization.quantize_`
"""
