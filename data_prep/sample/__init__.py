"""A small set of trajectories in the schema of GAIR/LIMI, made by driving real tools."""
