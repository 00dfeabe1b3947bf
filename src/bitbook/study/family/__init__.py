"""The family compared at equal bytes: every quantizer on an MNIST perceptron and on a public ResNet-20.

    bitbook study --dataset family
    python -m bitbook.study.family.document runs/family docs/results

methods.py    what is compared, on which networks: the cells
trial.py      one of them
document.py   docs/results/family.md
"""
