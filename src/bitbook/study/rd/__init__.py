"""Rate and distortion of every method, by bytes written (`bitbook rd`); plots.py draws it."""
