"""What examples say about a network's weights, before any of them is rounded.

calls.py        inputs in any form, as calls of the model
uses.py         which function uses which weight, with what inputs; recurrent.py for recurrent layers
importance.py   second moments of what weights are multiplied with
outputs.py      what predictions mean, and how far two of them are apart
fisher.py       the Fisher information's diagonal: what an error of each weight does to predictions
"""
