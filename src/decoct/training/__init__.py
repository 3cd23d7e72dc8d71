"""Training a whole model, whatever form its weights have: views of weights, the forward pass, the loop, checkpoints."""
