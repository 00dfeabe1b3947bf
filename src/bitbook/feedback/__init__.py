"""Error feedback: columns that are encoded later make up for the errors of those before.

columns.py          a recipe, a few columns at a time
error_feedback.py   `ErrorFeedback`, the encoder of one weight
calibrate.py        a whole model, layer by layer
"""
