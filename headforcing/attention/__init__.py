"""One attention call, from the arguments of the base model to its output; start reading at `module`."""
