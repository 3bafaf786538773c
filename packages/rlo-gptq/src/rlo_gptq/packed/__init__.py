"""From codes to a layer that stays packed and multiplies."""
