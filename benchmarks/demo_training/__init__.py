"""How the weights and labels of the demo model were made; not part of the package."""
