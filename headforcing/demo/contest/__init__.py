"""Memories compared on the demo model: entrants, paired seeds, intervals."""
