"""Healthy plain-torch pieces in which bugs are planted: one subject with every part, each part replaceable.

They share no code with the rest of minilm, so that what a check knows of them is true of foreign code too.
"""

from minilm.doctor.specimens.model import Attention, Block, FeedForward, Model, Norm, Rotary
from minilm.doctor.specimens.subject import subject
from minilm.doctor.specimens.training import Trainer

__all__ = ["Attention", "Block", "FeedForward", "Model", "Norm", "Rotary", "Trainer", "subject"]
