"""Frequency-domain anomalies (core.md 5.5): operators, and the generators that localise them."""
