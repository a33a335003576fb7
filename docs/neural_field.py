"""Fit an image with a small network, (row, column) ↦ (red, green, blue), and draw it: `python docs/neural_field.py`.

Needs PyTorch, scikit-learn, which brings the image, and matplotlib's Pillow. Prints the peak signal-to-noise ratio.
"""

import math
import time
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from backprop_gpu.torch import FusedMLP


class Field(nn.Module):
    """Coordinates in [0, 1]² to colours: random Fourier features (Tancik et al., 2020), then the network."""

    def __init__(self, n_features: int = 64, scale: float = 8.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(2, n_features))
        self.mlp = FusedMLP([2 * n_features, 128, 128, 3], activation="silu", output_activation="sigmoid")

    def forward(self, xy: torch.Tensor) -> torch.Tensor:
        """(N, 2) to (N, 3)."""
        angles = 2 * math.pi * xy @ self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


torch.manual_seed(0)
image = torch.tensor(load_sample_image("china.jpg")[::3, ::3] / 255.0, dtype=torch.float32)
height, width, _ = image.shape
rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
xy, colours = torch.stack([rows, columns], 2).reshape(-1, 2), image.reshape(-1, 3)

field = Field()
optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=1500)
start = time.perf_counter()
for _ in range(1500):
    batch = torch.randint(len(xy), (4096,))
    optimizer.zero_grad()
    nn.functional.mse_loss(field(xy[batch]), colours[batch]).backward()
    optimizer.step()
    schedule.step()

with torch.no_grad():
    fitted = field(xy)
error = nn.functional.mse_loss(fitted, colours)
parameters = sum(p.numel() for p in field.parameters())
print(f"{height} × {width} pixels in {parameters:,} parameters: {-10 * error.log10():.1f} dB")
print(f"{time.perf_counter() - start:.0f} s")

pair = torch.cat([image, torch.ones(height, 4, 3), fitted.reshape(image.shape)], 1)
picture = Image.fromarray((255 * pair).round().byte().numpy()).quantize(128)
picture.save(Path(__file__).with_name("neural_field.png"), optimize=True)
