"""Byte budgets on public networks: allocated (`bitbook study --dataset networks`) and fine-tuned (`--dataset tuned`).

trial.py        cells, and one of them: sensitivities, allocation, error feedback
tuned.py        the same for a short training to a budget
comparison.py   our files beside those of other tools: wins, losses, correlations
document.py     docs/results/networks.md; plots.py its figures
"""
