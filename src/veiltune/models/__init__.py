"""Models: how each family is cut, what runs on which side, and how adapters move between bases."""
