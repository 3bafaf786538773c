"""timm's own train.py with another loss: the script is transformed as it loads."""
