"""Training tickets side by side: the parts of the strategy that know neither a Trainer nor each other."""
