"""A budget of bytes in, a compressed model out.

sensitivity.py   what an error of each tensor does to the predictions
candidates.py    what each tensor could be stored as: bytes, and loss
allocate.py      the choice among them, to the byte
fit.py           all of it: measure, choose, encode, repair, weigh, choose again
"""
