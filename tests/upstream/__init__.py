"""Parity with the real base-model repositories, run on CPU with tiny random weights."""
