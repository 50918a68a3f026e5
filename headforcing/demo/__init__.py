"""The embedded demo: a synthetic world, a small trained video model, its pipeline and metrics."""
