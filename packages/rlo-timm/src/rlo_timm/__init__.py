"""rlo-timm."""

__version__ = "0.1.0"
