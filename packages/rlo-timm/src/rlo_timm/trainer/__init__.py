"""The built-in trainer, `rlo-timm train`: Lightning, timm, torchvision, torchmetrics."""
