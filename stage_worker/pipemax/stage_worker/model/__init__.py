"""The part of a model that one stage runs. `families` and `inspect` do not import torch."""
