"""What exists: schemas, sources of pictures, recipes, shards, tables and the workspace that holds them."""
