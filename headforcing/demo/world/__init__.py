"""The synthetic world of the demo, with ground truth at every frame, and its metrics."""
