"""`headforcing demo`: the videos, contact sheets and reports that it writes."""
