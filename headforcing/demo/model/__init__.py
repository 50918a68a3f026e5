"""The video model of the demo and its pipeline, with the interface of Self Forcing."""
