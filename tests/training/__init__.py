"""Training: views, the forward pass, the loop, stages."""
