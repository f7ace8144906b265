"""Anomalies of backbone features (core.md 5.7): operators, and the generators that place and calibrate
them."""
