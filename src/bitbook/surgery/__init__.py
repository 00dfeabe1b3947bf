"""Changes of a network that leave what it computes, or repair it after quantization.

batchnorm.py   statistics shifted or absorbed, normalisations folded into layers
biases.py      mean outputs corrected in biases
fold.py        a change of the inputs taken into the first layer
reorder.py     hidden units in the order that coders like
widen.py       a narrow network taken into a wide one
"""
