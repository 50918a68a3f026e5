"""A model of another group, its adapter and its host: the example of `docs/porting.md`."""
