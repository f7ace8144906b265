"""Training-free anomaly synthesis with Stable Diffusion (CUT / AnomalyAny, core.md 1)."""
