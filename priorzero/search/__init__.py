"""Planning: the mixture that enters at the root, and the tree search itself."""
