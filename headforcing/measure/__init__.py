"""What heads do: profiles, metrics, classifiers, stability, budgets, bytes, and pictures of them."""
