"""Train multilayer perceptrons at hardware speed, with every z, a and ∂C/∂z in sight."""

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.backends.selection import backends, get_backend
from backprop_gpu.gradcheck import gradcheck
from backprop_gpu.history import DivergenceError, History
from backprop_gpu.losses import AbsoluteError, BinaryCrossEntropy, CrossEntropy, Huber, Poisson, SquaredError
from backprop_gpu.mlp import MLP, Backprop, load
from backprop_gpu.optimizers import SGD, Adam, AdamW, RMSprop
from backprop_gpu.schedules import Constant, Cosine, ExponentialDecay, InverseScaling, StepDecay
from backprop_gpu.training import EarlyStopping

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "SGD",
    "AbsoluteError",
    "Adam",
    "AdamW",
    "Backprop",
    "BinaryCrossEntropy",
    "Constant",
    "Cosine",
    "CrossEntropy",
    "DivergenceError",
    "EarlyStopping",
    "ExponentialDecay",
    "History",
    "Huber",
    "InverseScaling",
    "Poisson",
    "RMSprop",
    "SquaredError",
    "StepDecay",
    "backends",
    "get_backend",
    "gradcheck",
    "load",
]
