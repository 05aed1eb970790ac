"""Record, analyse and edit the routers of pretrained Mixture-of-Experts language models."""

from importlib.metadata import version

__version__ = version("moetools")
