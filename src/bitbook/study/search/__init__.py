"""Recipes for each layer by search (`bitbook search`).

space.py    what can be chosen, as ladders from few bytes to many
search.py   Optuna's samplers on it, from the grid's front and the allocator's plans
report.py   the front that was found, over the grid's
"""
