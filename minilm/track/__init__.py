"""What a run shows and writes about itself. metrics.jsonl is the truth; console, SwanLab and loss.png mirror it.

metrics.py    the file: written line by line, read back exactly
tracker.py    `Tracker`, what the trainer talks to, and the settings
dashboard.py  the SwanLab process seen from the run; mirror.py is that process
console.py    the progress line and log.txt
curve.py      loss.png
"""

from __future__ import annotations

from minilm.track.console import Console
from minilm.track.curve import plot_curve
from minilm.track.metrics import read_metrics
from minilm.track.tracker import TrackConfig, Tracker

__all__ = ["Console", "TrackConfig", "Tracker", "plot_curve", "read_metrics"]
