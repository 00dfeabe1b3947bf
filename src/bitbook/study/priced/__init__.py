"""Trainings with a price on bits, and the two studies of them.

trial.py      one training; teacher.py the networks that teach
headline.py   the fewest bytes at each accuracy (`bitbook study --dataset headline`)
entropy.py    scalars, codebooks and their fusion under a price (`--dataset entropy`)
"""
