"""Comparison of presets and role maps on the demo model: entrants, paired seeds, intervals."""
