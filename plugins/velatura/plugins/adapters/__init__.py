"""Model adapters: each makes one network speak velocity, and knows nothing of rewards and objectives."""
