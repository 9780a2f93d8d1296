"""How the bundled models and their data were made; not installed."""

from vtc.zoo import torchvision

torchvision.mend()  # before any of the scripts imports transformers, which looks for it
