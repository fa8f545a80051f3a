"""One video made by several processes: guidance and tokens divided among them."""
