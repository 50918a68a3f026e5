"""The synthetic world of the demo, known at every frame, and how far a video is from it."""
