"""Several prompts in one video of the demo: timelines, runs, pictures."""
