"""What finds an anomaly: networks, losses, scoring and calibration."""
