"""The GPU path on a simulated device with two GPUs; see `tests.gpu.simulated`."""
