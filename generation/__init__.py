"""How an anomaly is made: arrays in, arrays out."""
