"""From calibration text to the Hessian of each layer."""
