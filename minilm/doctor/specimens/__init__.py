"""Healthy plain-torch pieces in which bugs are planted: one subject with every part, each part replaceable.

They share no code with the rest of minilm, so that what a check knows of them is true of foreign code too.
"""

from minilm.doctor.specimens.model import Attention, Block, FeedForward, Model, Norm, Rotary
from minilm.doctor.specimens.pipeline import Pipeline
from minilm.doctor.specimens.subject import subject
from minilm.doctor.specimens.training import AutocastTrainer, Trainer
from minilm.doctor.specimens.writing import Evaluation, Generator

__all__ = [
    "Attention",
    "AutocastTrainer",
    "Block",
    "Evaluation",
    "FeedForward",
    "Generator",
    "Model",
    "Norm",
    "Pipeline",
    "Rotary",
    "Trainer",
    "subject",
]
