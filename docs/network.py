"""Draw the README's picture: `python docs/network.py`."""

from pathlib import Path

import backprop_gpu as bp

net = bp.MLP([2, 3, 2], activation="sigmoid", seed=0, dtype="float64")
net.draw([[1.0, -1.0]], [0]).savefig(Path(__file__).with_name("network.png"), dpi=80)
