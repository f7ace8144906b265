"""From shards to a trained detector and its figures."""
