"""Methods that make up for what others took away, without training."""
